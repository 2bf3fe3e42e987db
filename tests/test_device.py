"Where the tensors of these tests live: on the processor, or where `--device` says; test_cuda.py runs this file there."
import torch

from pcam_tp.models import build

AT_IMPORT = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_where_they_live(request):
    device = torch.device(request.config.option.device or 'cpu').type
    model = build('small_cnn', width=.1)
    for t in (AT_IMPORT, torch.zeros(2), torch.tensor([1]), next(model.parameters()), model(AT_IMPORT)):
        assert t.device.type == device
    assert torch.zeros(2, device='cpu').device.type == 'cpu', 'what names its device stays there'
