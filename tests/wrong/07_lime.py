# Plausible wrong answers of 07_lime; the form is described in nbs/tools/02_classroom.ipynb.
# %% lime-kernel
# as published: the similarity goes in as a distance
    d = np.sqrt(masks.mean(1))
    return np.sqrt(np.exp(-d**2/width**2))

# %% lime-kernel
# the share that is hidden, not the cosine distance
    d = 1 - masks.mean(1)
    return np.sqrt(np.exp(-d**2/width**2))

# %% lime-kernel
# the weights turned round, not the distance
    d = np.sqrt(masks.mean(1))
    return 1 - np.sqrt(np.exp(-d**2/width**2))

# %% shapley-two
# one order only: first a, then b
    return a - empty, both - a

# %% shapley-two
# each alone: what they do together belongs to nobody
    return a - empty, b - empty

# %% shapley-two
# the gain in equal halves, whoever brought it
    return (both - empty)/2, (both - empty)/2

# %% shapley-two
# the two values in the wrong order
    return ((b - empty) + (both - a))/2, ((a - empty) + (both - b))/2

# %% tie-overlap
# the chance level of all pixels: the tie is left out
    return q/(2 - q)

# %% tie-overlap
# the share that both choose, not the intersection over the union
    return (q/tied)**2

# %% tie-overlap
# the overlap as a share of one choice, not of the union
    return q/tied
