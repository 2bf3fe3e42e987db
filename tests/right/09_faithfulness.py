# Right answers of 09_faithfulness in another style: they get their points. The form is that of tests/wrong.
# %% deletion-repair
# numpy generator, lexsort, one batch, float64
    r = np.random.default_rng(seed).random(m.numel())
    order = np.lexsort((r, -m.flatten().numpy()))
    imgs = [image.double()]
    for part in np.array_split(order, steps):
        nxt = imgs[-1].clone(); nxt.view(3, -1)[:, part] = colour; imgs.append(nxt)
    s = f(torch.stack(imgs)).numpy()
    return float(((s[1:] + s[:-1])/2).mean())

# %% deletion-repair
# noise breaks the ties, tensor returned
    g = torch.Generator().manual_seed(seed)
    order = (m + 1e-6*torch.rand(m.shape, generator=g)).flatten().argsort(descending=True)
    hidden, s = image.clone(), [f(image[None])[0]]
    for k in order.chunk(steps):
        hidden = hidden.clone(); hidden[:, k // image.shape[2], k % image.shape[2]] = colour
        s.append(f(hidden[None])[0])
    s = torch.stack(s)
    return ((s[1:] + s[:-1])/2).mean()

# %% share-axis
# numpy loop
    at = [(float((m >= t).double().mean()), float(s)) for t, s in zip(thresholds, scores)]
    pts = [(0., float(before)), *at[::-1]]
    return np.float64(sum((b[0] - a[0])*(a[1] + b[1])/2 for a, b in zip(pts, pts[1:])))

# %% share-axis
# negative of the backward integral
    x = np.array([(m.numpy() >= t).mean() for t in thresholds.numpy()] + [0.])
    y = np.array(scores.tolist() + [before])
    return -float(torch.trapezoid(torch.tensor(y), torch.tensor(x)))

# %% srg-chance
# numpy
    s, h = shown.numpy()[:, ::-1], hidden.numpy()
    below = lambda c: ((c[:, 1:] + c[:, :-1])/2).mean(1)
    return s, below(s) - below(h), 0

# %% srg-chance
# list, area(shown) - area(hidden)
    return [torch.flip(shown, [1]), area(shown) - area(hidden), torch.tensor(0.)]

# %% aopc-most
# a loop
    return sum(before - (before if k == 0 else lowest) for k in range(regions + 1))/(regions + 1)

# %% aopc-most
# 1 - 1/(L+1)
    return torch.tensor(before - lowest)*(1 - 1/(regions + 1))
