# Plausible wrong answers of 00_data; the form is described in nbs/tools/02_classroom.ipynb.
# %% contradictions
# the other column: tumour anywhere in the patch (a defect of one of the studies of notebook 15)
    return int((table.tumor_patch.to_numpy().astype(int) != np.asarray(y)).sum())
# %% contradictions
# compares the sums, which swapped labels leave as they are
    return int(abs(table.center_tumor_patch.sum() - np.sum(y)))
# %% centre-label
# one mistake found, the slice left: row 63 and column 63 are missing
    return masks[:, 32:63, 32:63].any((1, 2)).astype(int)
# %% centre-label
# the other mistake left: more than half of the box
    return (masks[:, 32:64, 32:64].mean((1, 2)) > .5).astype(int)
# %% centre-label
# tumour anywhere in the patch
    return masks.any((1, 2)).astype(int)
# %% colour-first
# the bug itself: reshape counts off anew
    return torch.from_numpy(x).reshape(len(x), 3, x.shape[1], x.shape[2]).float()/255
# %% colour-first
# the right axis in front, rows and columns exchanged: transposed patches
    return torch.from_numpy(x).permute(0, 3, 2, 1).reshape(len(x), 3, x.shape[1], x.shape[2]).float()/255
# %% colour-first
# divided by the brightest value of the batch, not by 255
    return torch.from_numpy(x).permute(0, 3, 1, 2).float()/int(x.max())
