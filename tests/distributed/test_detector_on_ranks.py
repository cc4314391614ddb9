"""A whole WS + BCN Mask R-CNN in DDP: ranks that have less to do than others."""

import pytest
import ranks
import torch
from conftest import ROOT, TINY
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from wsbcn_d2 import EstimatedBatchNorm2d, get_cfg

# What each step hands to rank 0; the other ranks have two objects on images of their own size.
STEPS = ("objects", "no objects", "no proposals", "objects")


def make_model(*overrides):
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / "shapes" / "mask_rcnn_R_18_FPN_bcn_ws.yaml"))
    cfg.merge_from_list([*TINY, *overrides])
    torch.manual_seed(0)
    return build_model(cfg).train()


def image(rank, step, objects):
    generator = torch.Generator().manual_seed(10 * step + rank)
    height, width = 64 + 32 * (rank % 2), 64 + 16 * rank
    instances = Instances((height, width))
    masks = torch.zeros(objects, height, width, dtype=torch.bool)
    boxes = torch.tensor([[4.0, 6, 40, 44], [20, 16, 60, 60]])[:objects]
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.arange(objects)
    instances.gt_masks = BitMasks(masks)
    pixels = torch.randint(0, 256, (3, height, width), generator=generator).to(torch.uint8)
    return [{"image": pixels, "height": height, "width": width, "instances": instances}]


def detector_worker(rank, world_size):
    model = make_model()
    ddp = DistributedDataParallel(model, broadcast_buffers=False)  # as Detectron2 does
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, momentum=0.9)
    hook = ranks.estimate_sync(ddp)
    norms = [m for m in model.modules() if isinstance(m, EstimatedBatchNorm2d)]
    mask_norm = model.roi_heads.mask_head.mask_fcn1.norm.bn
    inputs = []
    handle = model.roi_heads.mask_head.mask_fcn1.register_forward_pre_hook(
        lambda module, args: inputs.append(len(args[0]))
    )
    box_inputs = []
    handle2 = model.roi_heads.box_head.register_forward_pre_hook(
        lambda module, args: box_inputs.append(len(args[0]))
    )
    rpn = model.proposal_generator
    stock = rpn.predict_proposals

    def no_proposals(*args, **kwargs):
        return [proposals[:0] for proposals in stock(*args, **kwargs)]

    report = {"collectives": [], "same": [], "missing": [], "loss": [], "mask_count": []}
    report["layers"] = len(norms)
    for step, kind in enumerate(STEPS):
        kind = kind if rank == 0 else "objects"
        rpn.predict_proposals = no_proposals if kind == "no proposals" else stock
        batch = image(rank, step, 2 if kind == "objects" else 0)
        with EventStorage():
            loss = sum(ddp(batch).values())
        optimizer.zero_grad()
        loss.backward()
        report["missing"].append([n for n, p in model.named_parameters() if p.grad is None])
        optimizer.step()
        with ranks.counted_collectives() as calls:
            hook.after_step()
        report["collectives"].append(list(calls))
        report["same"].append(ranks.same_everywhere(model.state_dict()))
        report["loss"].append(loss.item())
        report["mask_count"].append(int(mask_norm.num_batches_tracked))
    handle.remove()
    handle2.remove()
    report["mask_inputs"], report["box_inputs"] = inputs, box_inputs
    report["finite"] = all(value.isfinite().all() for value in model.state_dict().values())
    return report


@pytest.fixture(scope="module", params=[2, 4])
def reports(request):
    return ranks.run(detector_worker, request.param)


def test_weights_and_estimates_are_the_same_after_every_step(reports):
    for report in reports:
        assert report["same"] == [True] * len(STEPS)
        assert report["finite"]


def test_one_collective_for_the_estimates_of_all_layers(reports):
    for report in reports:
        assert report["layers"] > 20
        assert report["collectives"] == [["all_reduce"]] * len(STEPS)


def test_a_rank_with_an_empty_mask_head_or_no_proposals_stalls_nobody(reports):
    first = reports[0]
    assert first["mask_inputs"][0] > 0 and first["mask_inputs"][3] > 0
    assert first["mask_inputs"][1:3] == [0, 0]
    assert first["box_inputs"][1] > 0 and first["box_inputs"][2] == 0
    for report in reports:
        assert report["missing"] == [[]] * len(STEPS)  # a gradient for every parameter
        assert report["mask_count"] == [1, 2, 3, 4]
        assert all(0 < loss < 100 for loss in report["loss"])
