# Right answers of 03_gradcam in another style: they get their points. The form is that of tests/wrong.
# %% gradcam-weights
# einsum, float64
    return torch.einsum('nc,nchw->nhw', g.double().mean((2, 3)), A.double())
# %% gradcam-weights
# loop
    out = torch.zeros(len(A), *A.shape[2:])
    for i in range(len(A)):
        for k in range(A.shape[1]): out[i] += g[i, k].mean()*A[i, k]
    return out
# %% gradcam-weights
# numpy
    A, g = A.numpy(), g.numpy()
    return (g.mean(axis=(2, 3), keepdims=True)*A).sum(axis=1)
# %% repaired-gradcam
# einsum
    A, g = same_pass(model, x, target, layer, 'log_odds')
    return torch.einsum('nk,nkhw->nhw', g.flatten(2).mean(2), A)
# %% repaired-gradcam
# an image at a time, numpy
    maps = []
    for i in range(len(x)):
        A, g = same_pass(model, x[i:i + 1], target[i:i + 1], layer)
        maps.append(sum(g[0, k].mean()*A[0, k] for k in range(A.shape[1])))
    return torch.stack(maps).numpy()
# %% repaired-gradcam
# the library
    from pcam_tp.cam import cam_grids
    return cam_grids(model, x, target, layers=layer, methods=('gradcam',))[layer]['gradcam']
# %% truth-on-grid
# pooling
    return F.adaptive_avg_pool2d(masks.float()[:, None], cells)[:, 0]
# %% truth-on-grid
# loop, float64 numpy
    n, h, w = masks.shape
    out, a, b = np.zeros((n, cells, cells)), h//cells, w//cells
    for i in range(cells):
        for j in range(cells): out[:, i, j] = masks[:, i*a:i*a + a, j*b:j*b + b].double().mean((1, 2))
    return out
