# Plausible wrong answers of 05_occlusion; the form is described in nbs/tools/02_classroom.ipynb.
# %% occlusion-repair
# the remaining score, not the drop
    total, count = torch.zeros(image.shape[1:]), torch.zeros(image.shape[1:])
    for top in range(0, image.shape[1] - window + 1, stride):
        for left in range(0, image.shape[2] - window + 1, stride):
            hidden = image.clone()
            hidden[:, top:top + window, left:left + window] = colour
            total[top:top + window, left:left + window] += f(hidden[None]).item()
            count[top:top + window, left:left + window] += 1
    return total/count

# %% occlusion-repair
# a drop, but the last window still overwrites the others
    out, before = torch.zeros(image.shape[1:]), f(image[None]).item()
    for top in range(0, image.shape[1] - window + 1, stride):
        for left in range(0, image.shape[2] - window + 1, stride):
            hidden = image.clone()
            hidden[:, top:top + window, left:left + window] = colour
            out[top:top + window, left:left + window] = before - f(hidden[None]).item()
    return out

# %% occlusion-repair
# the second sigmoid is still there
    total, count, before = torch.zeros(image.shape[1:]), torch.zeros(image.shape[1:]), f(image[None]).sigmoid().item()
    for top in range(0, image.shape[1] - window + 1, stride):
        for left in range(0, image.shape[2] - window + 1, stride):
            hidden = image.clone()
            hidden[:, top:top + window, left:left + window] = colour
            total[top:top + window, left:left + window] += before - f(hidden[None]).sigmoid().item()
            count[top:top + window, left:left + window] += 1
    return total/count

# %% occlusion-repair
# the image itself is painted over, window after window
    total, count, before = torch.zeros(image.shape[1:]), torch.zeros(image.shape[1:]), f(image[None]).item()
    for top in range(0, image.shape[1] - window + 1, stride):
        for left in range(0, image.shape[2] - window + 1, stride):
            image[:, top:top + window, left:left + window] = colour
            total[top:top + window, left:left + window] += before - f(image[None]).item()
            count[top:top + window, left:left + window] += 1
    return total/count

# %% occlusion-repair
# the sum over the windows on a pixel, not their mean
    total, before = torch.zeros(image.shape[1:]), f(image[None]).item()
    for top in range(0, image.shape[1] - window + 1, stride):
        for left in range(0, image.shape[2] - window + 1, stride):
            hidden = image.clone()
            hidden[:, top:top + window, left:left + window] = colour
            total[top:top + window, left:left + window] += before - f(hidden[None]).item()
    return total

# %% two-spots
# the drops of two spots of brightness 1, whatever a and b are
    return dict(either=(0, 0, 1), both=(1, 1, 1), sum=(.5, .5, 1))[evidence]

# %% two-spots
# what remains, not what is lost
    score = dict(either=max, both=min, sum=lambda a, b: (a + b)/2)[evidence]
    return score(0, b), score(a, 0), score(0, 0)

# %% two-spots
# "both hidden" taken for the sum of the two single drops
    score = dict(either=max, both=min, sum=lambda a, b: (a + b)/2)[evidence]
    first, second = score(a, b) - score(0, b), score(a, b) - score(a, 0)
    return first, second, first + second

# %% rise-weights
# as published: the mean score is not subtracted
    return torch.einsum('n,nhw->hw', scores, masks)/(len(scores)*p)

# %% rise-weights
# divided by how often a pixel was visible, not by n·p
    return torch.einsum('n,nhw->hw', scores - scores.mean(), masks)/masks.sum(0)

# %% rise-weights
# p is forgotten
    return torch.einsum('n,nhw->hw', scores - scores.mean(), masks)/len(scores)
