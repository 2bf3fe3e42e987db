# Plausible wrong answers of 03_gradcam; the form is described in nbs/tools/02_classroom.ipynb.
# %% gradcam-weights
# no mean over the grid: this is HiResCAM
    return (g*A).sum(1)
# %% gradcam-weights
# the sum over the grid for the mean, with the ReLU of the paper
    return (g.sum((2, 3), keepdim=True)*A).sum(1).relu()
# %% gradcam-weights
# the mean goes over the batch as well: every image gets the same weights
    return (g.mean((0, 2, 3), keepdim=True)*A).sum(1)
# %% repaired-gradcam
# two tensors: the gradient before batch normalisation and ReLU, the activation behind them (system T, no. 2)
    A, _ = same_pass(model, x, target, layer)
    _, g = same_pass(model, x, target, 'late.0')
    return (g.mean((2, 3), keepdim=True)*A).sum(1)
# %% repaired-gradcam
# the gradient of the probability (system T, no. 10)
    A, g = same_pass(model, x, target, layer, score='probability')
    return (g.mean((2, 3), keepdim=True)*A).sum(1)
# %% repaired-gradcam
# the ReLU before the sum
    A, g = same_pass(model, x, target, layer)
    return (g.mean((2, 3), keepdim=True)*A).relu().sum(1)
# %% repaired-gradcam
# the layer is not the one that was asked for (system T, no. 3)
    A, g = same_pass(model, x, target, 'late')
    return (g.mean((2, 3), keepdim=True)*A).sum(1)
# %% truth-on-grid
# place before block: every third pixel in one cell
    n, h, w = masks.shape
    return masks.float().view(n, h//cells, cells, w//cells, cells).mean((1, 3))
# %% truth-on-grid
# one pixel of each cell, as a nearest-neighbour resize takes it
    n, h, w = masks.shape
    return masks[:, ::h//cells, ::w//cells].float()
# %% truth-on-grid
# any tumour in the cell, for its share
    return F.adaptive_max_pool2d(masks.float()[:, None], cells)[:, 0]
