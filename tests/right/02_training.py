# Right answers of 02_training in another style: they get their points. The form is that of tests/wrong.
# %% moved-label
# roll the masks, int result
    return np.roll(masks, (-down, -right), (1, 2))[:, 32:64, 32:64].max((1, 2)).astype(int)
# %% moved-label
# loop, list
    return [bool(k[32 + down:64 + down, 32 + right:64 + right].sum()) for k in masks]
# %% winner
# loop, list
    a, b = 0, 0
    for v, t in zip(valid, test):
        k = max(range(len(v)), key=lambda i: v[i])
        a += v[k]/len(valid); b += t[k]/len(valid)
    return [a, b]
# %% winner
# torch
    v, t = torch.tensor(valid, dtype=torch.float32), torch.tensor(test, dtype=torch.float32)
    best, at = v.max(1)
    return best.mean().item(), t.gather(1, at[:, None]).mean().item()
# %% undo-softmax
# logit, float32
    return .5 + torch.logit(q.float())/2
# %% undo-softmax
# numpy
    q = q.numpy()
    return (np.log(q) - np.log1p(-q) + 1)/2
# %% calibration
# right-closed bins by digitize
    bins = np.clip(np.digitize(p, np.linspace(0, 1, n_bins + 1), right=True) - 1, 0, n_bins - 1)
    total = 0.
    for b in range(n_bins):
        at = bins == b
        if at.any(): total += at.sum()/len(p)*abs(y[at].mean() - p[at].mean())
    return total
# %% calibration
# pandas
    d = pd.DataFrame(dict(y=y, p=p, b=np.clip(np.floor(p*n_bins), 0, n_bins - 1)))
    g = d.groupby('b').agg(y=('y', 'mean'), p=('p', 'mean'), n=('y', 'size'))
    return np.average((g.y - g.p).abs(), weights=g.n)
# %% calibration
# |sum of y − sum of p| a bin, float32
    bins = np.minimum((p*n_bins).astype(int), n_bins - 1)
    return np.float32(np.abs(np.bincount(bins, y - p)).sum()/len(p))
