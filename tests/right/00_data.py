# Right answers of 00_data in another style: they get their points. The form is that of tests/wrong.
# %% contradictions
# loop, Python int
    n = 0
    for label, centre in zip(y, table['center_tumor_patch']):
        n += bool(label) != bool(centre)
    return n
# %% contradictions
# numpy int64
    return np.sum(table.center_tumor_patch.values != y)
# %% contradictions
# pandas
    return (table.center_tumor_patch.reset_index(drop=True).astype(int) != pd.Series(y)).sum()
# %% centre-label
# bools
    return masks[:, 32:64, 32:64].max(axis=(1, 2))
# %% centre-label
# list by a loop
    return [int(k[32:64, 32:64].sum() > 0) for k in masks]
# %% centre-label
# torch
    return torch.from_numpy(masks[:, 32:64, 32:64]).flatten(1).any(1).float()
# %% colour-first
# by numpy
    return torch.tensor(np.moveaxis(x, 3, 1).astype('float32')/255)
# %% colour-first
# loop, contiguous
    return torch.stack([torch.stack([torch.from_numpy(p[..., c]/255.).float() for c in range(3)]) for p in x])
