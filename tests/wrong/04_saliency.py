# Plausible wrong answers of 04_saliency; the form is described in nbs/tools/02_classroom.ipynb.
# %% common-term
# the gradient of the logit: the ring is still there
    return gradient_by_hand(model, x, target, 'logit').sum(1)
# %% common-term
# the gradient of the probability, a p(1 − p)-th of the answer: it fades where the network is sure
    return gradient_by_hand(model, x, target, 'probability').sum(1)
# %% common-term
# always class 1 less class 0, whatever the target
    one, zero = (gradient_by_hand(model, x, torch.full_like(target, c), 'logit') for c in (1, 0))
    return (one - zero).sum(1)
# %% common-term
# the mean over the colours for their sum: a third of the answer
    difference = gradient_by_hand(model, x, target, 'logit') - gradient_by_hand(model, x, 1 - target, 'logit')
    return difference.mean(1)
# %% noise
# noise in absolute units: what NoiseTunnel does
    return x + noise*torch.randn(n, *x.shape, generator=generator)
# %% noise
# the standard deviation of the image for its range
    return x + noise*x.std()*torch.randn(n, *x.shape, generator=generator)
# %% noise
# clamped as if to be drawn
    return (x + noise*(x.max() - x.min())*torch.randn(n, *x.shape, generator=generator)).clamp(0, 1)
# %% noise
# the same noise in every copy
    return torch.stack([x + noise*(x.max() - x.min())*torch.randn(x.shape, generator=generator)]*n)
# %% noise
# the generator is not used: another call gives another map
    return x + noise*(x.max() - x.min())*torch.randn(n, *x.shape)
# %% guided-by-hand
# the positive part of the finished gradient, not of what arrives at the ReLU
    return ((v*(W @ x > 0)) @ W).relu()
# %% guided-by-hand
# the plain gradient
    return (v*(W @ x > 0)) @ W
# %% guided-by-hand
# the closed units pass as well: this is the "deconvnet"
    return v.relu() @ W
