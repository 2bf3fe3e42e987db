# Right answers of 06_integrated_gradients in another style: they get their points. The form is that of tests/wrong.
# %% path-integral
# numpy accumulation, float64
    total = np.zeros(len(x))
    for k in range(n):
        total = total + gradient(b + (k + .5)/n*(x - b)).double().numpy()
    return (x - b).numpy()*total/n

# %% path-integral
# mean of a stack, torch.lerp
    return (x - b)*torch.stack([gradient(torch.lerp(b, x, (k + .5)/n)) for k in range(n)]).mean(0)

# %% path-integral
# list of floats
    g = torch.stack([gradient(b + a*(x - b)) for a in torch.linspace(.5/n, 1 - .5/n, n)])
    return [float((x[i] - b[i])*g[:, i].mean()) for i in range(len(x))]

# %% delta
# a loop, a list
    out = []
    for c, u, v in zip(credits, f_x, f_b):
        d = float(u - v)
        out.append(abs(float(c.double().sum()) - d)/abs(d))
    return out

# %% delta
# relative: |sum/difference − 1|, numpy
    d = (f_x - f_b).numpy()
    return np.abs(credits.flatten(1).sum(1).numpy()/d - 1)

# %% sound-weights
# a loop, lists
    h = 1/(n - 1)
    p, w = [k*h for k in range(n)], [0.]*n
    for k in range(n - 1):
        w[k] += h/2; w[k + 1] += h/2
    return p, w

# %% sound-weights
# torch
    w = torch.full((n,), 1/(n - 1)); w[0] /= 2; w[-1] /= 2
    return torch.linspace(0, 1, n), w

# %% sound-weights
# scipy on the unit vectors
    return np.linspace(0, 1, n), scipy.integrate.trapezoid(np.eye(n), dx=1/(n - 1))
