# Plausible wrong answers of 06_integrated_gradients; the form is described in nbs/tools/02_classroom.ipynb.
# %% path-integral
# right ends of the steps, not their middles
    points = [(k + 1)/n for k in range(n)]
    return (x - b)*sum(gradient(b + a*(x - b)) for a in points)/n

# %% path-integral
# gradient × input: the gradient at the image alone
    return (x - b)*gradient(x)

# %% path-integral
# the path from 0, whatever the baseline is
    points = [(k + .5)/n for k in range(n)]
    return (x - b)*sum(gradient(a*x) for a in points)/n

# %% path-integral
# multiplied by x, not by x − b
    points = [(k + .5)/n for k in range(n)]
    return x*sum(gradient(b + a*(x - b)) for a in points)/n

# %% path-integral
# n + 1 points with both ends, all counted alike
    points = [k/n for k in range(n + 1)]
    return (x - b)*sum(gradient(b + a*(x - b)) for a in points)/(n + 1)

# %% delta
# as reported, image by image: divided by the sizes of the credits
    delta = credits.sum((1, 2, 3)) - (f_x - f_b)
    return delta.abs()/credits.abs().sum((1, 2, 3))

# %% delta
# the images still meet in one sum
    delta = credits.sum() - (f_x - f_b).sum()
    return (delta.abs()/(f_x - f_b).abs().sum()).expand(len(f_x))

# %% delta
# a share of f(x), not of the difference
    delta = credits.sum((1, 2, 3)) - (f_x - f_b)
    return delta.abs()/f_x.abs()

# %% delta
# the sizes of the credits are added up, not the credits
    delta = credits.abs().sum((1, 2, 3)) - (f_x - f_b)
    return delta.abs()/(f_x - f_b).abs()

# %% sound-weights
# captum's trapezoid: divided by n, so that a linear model loses 1/n
    return np.linspace(0, 1, n), np.r_[.5, np.ones(n - 2), .5]/n

# %% sound-weights
# both ends counted like all others
    return np.linspace(0, 1, n), np.full(n, 1/n)

# %% sound-weights
# right weights at the middles of n steps
    return (np.arange(n) + .5)/n, np.r_[.5, np.ones(n - 2), .5]/(n - 1)
