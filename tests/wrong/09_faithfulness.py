# Plausible wrong answers of 09_faithfulness; the form is described in nbs/tools/02_classroom.ipynb.
# %% deletion-repair
# the area above the curve, as published
    mix = torch.randperm(m.numel(), generator=torch.Generator().manual_seed(seed))
    order = mix[m.flatten().cpu()[mix].argsort(descending=True, stable=True)]
    hidden = image.clone()
    scores = [f(hidden[None]).item()]
    for hide in order.chunk(steps):
        hidden.view(3, -1)[:, hide] = colour
        scores.append(f(hidden[None]).item())
    return 1 - torch.trapezoid(torch.tensor(scores), dx=1/(len(scores) - 1)).item()

# %% deletion-repair
# the emptied image is never asked
    mix = torch.randperm(m.numel(), generator=torch.Generator().manual_seed(seed))
    order = mix[m.flatten().cpu()[mix].argsort(descending=True, stable=True)]
    hidden, scores = image.clone(), []
    for hide in order.chunk(steps):
        scores.append(f(hidden[None]).item())
        hidden.view(3, -1)[:, hide] = colour
    return torch.trapezoid(torch.tensor(scores), dx=1/(len(scores) - 1)).item()

# %% deletion-repair
# ties in the order of rows
    order = m.flatten().argsort(descending=True, stable=True)
    hidden = image.clone()
    scores = [f(hidden[None]).item()]
    for hide in order.chunk(steps):
        hidden.view(3, -1)[:, hide] = colour
        scores.append(f(hidden[None]).item())
    return torch.trapezoid(torch.tensor(scores), dx=1/(len(scores) - 1)).item()

# %% deletion-repair
# ties drawn, but not with the seed
    mix = torch.randperm(m.numel())
    order = mix[m.flatten().cpu()[mix].argsort(descending=True, stable=True)]
    hidden = image.clone()
    scores = [f(hidden[None]).item()]
    for hide in order.chunk(steps):
        hidden.view(3, -1)[:, hide] = colour
        scores.append(f(hidden[None]).item())
    return torch.trapezoid(torch.tensor(scores), dx=1/(len(scores) - 1)).item()

# %% deletion-repair
# `view` writes into the image
    mix = torch.randperm(m.numel(), generator=torch.Generator().manual_seed(seed))
    order = mix[m.flatten().cpu()[mix].argsort(descending=True, stable=True)]
    pixels, scores = image.view(3, -1), [f(image[None]).item()]
    for hide in order.chunk(steps):
        pixels[:, hide] = colour
        scores.append(f(image[None]).item())
    return torch.trapezoid(torch.tensor(scores), dx=1/(len(scores) - 1)).item()

# %% deletion-repair
# mixed, and the order not taken back to the pixels
    mix = torch.randperm(m.numel(), generator=torch.Generator().manual_seed(seed))
    order = m.flatten().cpu()[mix].argsort(descending=True, stable=True)
    hidden = image.clone()
    scores = [f(hidden[None]).item()]
    for hide in order.chunk(steps):
        hidden.view(3, -1)[:, hide] = colour
        scores.append(f(hidden[None]).item())
    return torch.trapezoid(torch.tensor(scores), dx=1/(len(scores) - 1)).item()

# %% share-axis
# over the thresholds, as published
    return torch.trapezoid(scores, thresholds).item()

# %% share-axis
# the point with nothing hidden is missing
    shares = torch.stack([(m >= t).float().mean() for t in thresholds])
    return torch.trapezoid(scores.flip(0), shares.flip(0)).item()

# %% share-axis
# evenly spaced points, whatever share they hide
    return torch.trapezoid(torch.cat([torch.tensor([float(before)]), scores.flip(0)]), dx=1/len(scores)).item()

# %% share-axis
# the share that is still visible
    shares = torch.stack([(m < t).float().mean() for t in thresholds])
    x, y = torch.cat([1 - shares, torch.zeros(1)]), torch.cat([scores, torch.tensor([float(before)])])
    return torch.trapezoid(y, x).item()

# %% srg-chance
# the insertion curve is not turned round
    return shown, area(shown) - area(hidden), 0.

# %% srg-chance
# the difference the other way round
    least_first = shown.flip(1)
    return least_first, area(hidden) - area(least_first), 0.

# %% srg-chance
# chance at one half, as for a coin
    least_first = shown.flip(1)
    return least_first, area(least_first) - area(hidden), .5

# %% aopc-most
# the term with nothing replaced is forgotten
    return before - lowest

# %% aopc-most
# divided by L where L + 1 images are asked, summed over all of them
    return (before - lowest)*(regions + 1)/regions

# %% aopc-most
# a score that falls in equal steps to the lowest, not at once
    return (before - lowest)/2
