# Plausible wrong answers of 02_training; the form is described in nbs/tools/02_classroom.ipynb.
# %% moved-label
# the sign: the image is moved, not the box
    return masks[:, 32 - down:64 - down, 32 - right:64 - right].any((1, 2))
# %% moved-label
# only the beginning of the box is moved
    return masks[:, 32 + down:64, 32 + right:64].any((1, 2))
# %% moved-label
# rows and columns exchanged
    return masks[:, 32 + right:64 + right, 32 + down:64 + down].any((1, 2))
# %% winner
# chosen on the test patches as well (explained and chosen on the same split: system R)
    return valid.max(1).mean(), test.max(1).mean()
# %% winner
# one winner for all rows: no luck is left
    won = valid.mean(0).argmax()
    return valid[:, won].mean(), test[:, won].mean()
# %% winner
# the largest over the wrong axis
    won = valid.argmax(0)
    return valid[won, np.arange(valid.shape[1])].mean(), test[won, np.arange(valid.shape[1])].mean()
# %% undo-softmax
# the log-odds of q, which are 2p − 1
    return torch.log(q/(1 - q))
# %% undo-softmax
# a straight line between the ends
    low, high = torch.sigmoid(torch.tensor([-1., 1.]))
    return (q - low)/(high - low)
# %% calibration
# every bin counts the same
    bins = np.minimum((p*n_bins).astype(int), n_bins - 1)
    return np.mean([abs(y[bins == b].mean() - p[bins == b].mean()) for b in np.unique(bins)])
# %% calibration
# a gap with its sign: bins that are too high make up for bins that are too low
    bins = np.minimum((p*n_bins).astype(int), n_bins - 1)
    return abs(sum((y[bins == b].mean() - p[bins == b].mean())*(bins == b).mean() for b in np.unique(bins)))
