# Right answers of 07_lime in another style: they get their points. The form is that of tests/wrong.
# %% lime-kernel
# a loop with math, a list
    out = []
    for z in masks:
        d = 1 - math.sqrt(sum(z)/len(z))
        out.append(math.exp(-d*d/(2*width*width)))
    return out

# %% lime-kernel
# the cosine distance of scipy, 32 bits of torch
    from scipy.spatial.distance import cdist
    d = cdist(np.asarray(masks, float), np.ones((1, masks.shape[1])), 'cosine')[:, 0]
    return torch.tensor(np.sqrt(np.exp(-(d**2)/width**2))).float()

# %% shapley-two
# array
    orders = np.array([[a - empty, both - a], [both - b, b - empty]])
    return orders.mean(0)

# %% shapley-two
# even split plus half of the difference
    return [(both - empty)/2 + (a - b)/2, (both - empty)/2 - (a - b)/2]

# %% tie-overlap
# library, tensor
    return torch.tensor(chance_iou(q/tied))

# %% tie-overlap
# one formula
    return q/(2*tied - q)
