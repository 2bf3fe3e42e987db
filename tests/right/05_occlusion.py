# Right answers of 05_occlusion in another style: they get their points. The form is that of tests/wrong.
# %% occlusion-repair
# numpy map, all windows in one batch, float64
    tops, lefts = (range(0, side - window + 1, stride) for side in image.shape[1:])
    places = [(t, l) for t in tops for l in lefts]
    batch = image.double().repeat(len(places), 1, 1, 1)
    for k, (t, l) in enumerate(places): batch[k, :, t:t+window, l:l+window] = colour
    drop = (f(image[None].double()) - f(batch)).numpy()
    total, count = np.zeros(image.shape[1:]), np.zeros(image.shape[1:])
    for d, (t, l) in zip(drop, places):
        total[t:t+window, l:l+window] += d; count[t:t+window, l:l+window] += 1
    return total/count

# %% two-spots
# a list of ifs
    if evidence == 'sum': return [a/2, b/2, (a + b)/2]
    if evidence == 'either':
        top = a if a > b else b
        return [top - b, top - a, top]
    return [min(a, b)]*3

# %% two-spots
# torch numbers
    a, b = torch.tensor(float(a)), torch.tensor(float(b))
    s = {'either': torch.maximum, 'both': torch.minimum, 'sum': lambda u, v: (u+v)/2}[evidence]
    z = torch.tensor(0.)
    return torch.stack([s(a, b) - s(z, b), s(a, b) - s(a, z), s(a, b)])

# %% rise-weights
# a loop, numpy, float64
    s, m = scores.double().numpy(), masks.double().numpy()
    out = np.zeros(m.shape[1:])
    for k in range(len(s)): out = out + (s[k] - s.mean())*m[k]
    return out/len(s)/p

# %% rise-weights
# the means subtracted
    return ((scores[:, None, None]*masks).mean(0) - scores.mean()*masks.mean(0))/p
