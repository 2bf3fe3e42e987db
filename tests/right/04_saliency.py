# Right answers of 04_saliency in another style: they get their points. The form is that of tests/wrong.
# %% common-term
# by both classes and where
    one, zero = (gradient_by_hand(model, x, torch.full_like(target, c), 'logit').sum(1) for c in (1, 0))
    return torch.where(target.bool()[:, None, None], one - zero, zero - one)
# %% common-term
# float64, an image at a time
    maps = []
    for i in range(len(x)):
        a = gradient_by_hand(model, x[i:i+1], target[i:i+1], 'logit')
        b = gradient_by_hand(model, x[i:i+1], 1 - target[i:i+1], 'logit')
        maps.append((a - b).double().sum(1)[0])
    return torch.stack(maps)
# %% noise
# a loop of throws
    s = noise*(x.max() - x.min())
    return torch.stack([x + s*torch.randn(x.shape, generator=generator) for _ in range(n)])
# %% noise
# torch.normal, numpy result
    s = float(noise*(x.max() - x.min()))
    return (x[None] + torch.normal(0., 1., (n, *x.shape), generator=generator)*s).numpy()
# %% guided-by-hand
# autograd with a hook
    x = x.clone().requires_grad_()
    out = (W @ x).relu()
    out.register_hook(torch.relu)
    return torch.autograd.grad(v @ out, x)[0]
# %% guided-by-hand
# loop over units, float64
    total = torch.zeros(W.shape[1], dtype=torch.float64)
    for w, a in zip(W, v):
        if w @ x > 0 and a > 0: total += a*w
    return total
