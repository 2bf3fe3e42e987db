"""A network that crops: controls, metrics and similarities keep to what it sees, because the zeros outside are nobody's."""
import pytest
import torch
from torch import nn

from pcam_tp.classifier import Classifier
from pcam_tp.controls import CONTROLS, random_map, with_controls
from pcam_tp.localisation import LOCALISATION
from pcam_tp.maps import centre_mask
from pcam_tp.measures import measure
from pcam_tp.methods import METHODS, precision_table
from pcam_tp.robustness import haas_controls, max_sensitivity
from pcam_tp.sanity import map_similarity, randomised_maps, sanity_score

SIDE, CROP = 24, 16


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return Classifier(net, crop=CROP, layers='0')


def images(n=8): return torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_part_and_within(model):
    maps = torch.rand(2, SIDE, SIDE)
    seen = model.cropped(maps)
    assert seen.shape == (2, CROP, CROP) and torch.equal(seen, maps[:, 4:20, 4:20])
    out = model.within(lambda m: m + 1, maps)
    assert torch.equal(model.cropped(out), seen + 1) and out.count_nonzero() == CROP**2*2
    whole = Classifier(nn.Flatten())
    assert torch.equal(whole.cropped(maps), maps) and torch.equal(whole.within(lambda m: -m, maps), -maps)


@pytest.mark.parametrize('name', CONTROLS)
def test_maps_that_never_move(model, name):
    "Max-Sensitivity of maps that do not look at the image is 0; what they paint outside of the crop is cut both times."
    value = max_sensitivity(model, images(), CONTROLS[name], 1, draws=2)
    assert (value > 0).all() if name == 'edges' else (value == 0).all()


def test_chance(model):
    "Maps without knowledge get the declared chance, also where the crop cuts the mask's surroundings away."
    x = images(60)
    found = measure(LOCALISATION, model, x, dict(random=random_map), 1, masks=centre_mask(SIDE, SIDE))
    for name, metric in LOCALISATION.items():
        v = found[name]['random']
        assert abs(v.mean() - metric.chance) < 4*v.std()/60**.5, name
    outside = torch.ones(SIDE, SIDE, dtype=torch.bool)
    outside[4:20, 4:20] = False
    judged = measure(LOCALISATION, model, x, dict(random=random_map), 1, masks=outside)
    assert all(v['random'].isnan().all() for v in judged.values()), 'a mask that the network cannot see judges nobody'


def test_controls_stay_inside(model):
    maps = with_controls(dict(saliency=METHODS['saliency']), model, images(), 1)
    for name, m in maps.items():
        assert m.any() and torch.equal(m, model.within(lambda v: v, m)), name
    moved = torch.stack([maps['saliency, shifted'], maps['saliency']]).flatten(2).sort(2).values
    torch.testing.assert_close(*moved)   # the same values in another place


def test_contrast_without_a_place(model):
    a = model.within(lambda m: m, torch.rand(4, SIDE, SIDE))
    found = haas_controls(a, 0, model)
    torch.testing.assert_close(found['constant'], model.within(lambda m: m.mean((1, 2), keepdim=True).expand_as(m), a))
    assert all(torch.equal(m, model.within(lambda v: v, m)) for m in found.values())


def test_zeros_do_not_agree(model):
    "Numbers drawn anew for every network are as unlike as without a crop: the mean is 0; with the zeros above .3."
    x = images(40)
    maps = randomised_maps(dict(random=random_map), model, x, 1)
    assert maps['trained']['random'].shape == (40, CROP, CROP)
    a, b = maps['trained']['random'], random_map(model, x, 1, seed=1)
    assert abs(map_similarity(a, model.cropped(b).cpu()).mean()) < .03
    assert map_similarity(*(model.within(lambda v: v, m) for m in (random_map(model, x, 1), b))).mean() > .3
    assert sanity_score(METHODS['saliency'], model, x, 1).shape == (40,)


def test_precision(model):
    "Rounding is judged where there is something to round."
    x, shown = images(), []
    class Watched(Classifier):
        def cropped(self, maps):
            shown.append(maps.shape)
            return super().cropped(maps)
    model.__class__ = Watched
    precision_table(model, x, 1, 'saliency')
    assert shown == [(8, SIDE, SIDE)]*2
