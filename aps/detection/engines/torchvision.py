"""Engine torchvision: torchvision's Mask R-CNN on the backbone of `aps.detection.vitdet`. Runs wherever torch does.

The heads are ViTDet's: two convolutions in the proposal network, four and a hidden layer for boxes, four for masks, with
LayerNorm. Where torchvision computes something else than detectron2 (region pooling, initial weights of the predictors,
mask targets, pasting of masks), this engine follows detectron2, so that the same settings mean the same thing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as T
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align

from aps.detection import engine
from aps.detection.annotations import Positions, image_at, seed_of
from aps.detection.augment import jitter, scaled_size
from aps.detection.engine import After, Prediction, Task
from aps.detection.geometry import strides
from aps.detection.score import coco_metrics
from aps.detection.vitdet import SimpleFeaturePyramid
from aps.models.archs import dimensions
from aps.runtime.cores import loading
from aps.runtime.precision import Precision
from aps.settings.blocks import DetectionSettings
from aps.training.watch import Watch

MASKS = 10  # instances of an image, for the shared memory that its masks take
# torchvision's names of the losses -> ours.
LOSSES = {
    "loss_objectness": "loss_proposal_class",
    "loss_rpn_box_reg": "loss_proposal_box",
    "loss_classifier": "loss_class",
    "loss_box_reg": "loss_box",
    "loss_mask": "loss_mask",
}


class Engine(engine.Engine):
    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.device = task.processes.device
        self.precision = Precision(task.settings.precision, self.device)
        self.model = build_model(task).to(self.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, task.settings, dimensions(task.encoder).depth), lr=task.settings.lr
        )
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self._done = 0

    def train(self, start: int, after: After) -> None:
        settings, processes = self.task.settings, self.task.processes
        forward: nn.Module = self.model.train()
        if processes.world > 1:
            forward = DistributedDataParallel(self.model, broadcast_buffers=False)
        watch = Watch("detection", "detection", processes, self.task.train.manifest)
        positions = Positions(settings.batch_size, start, processes.rank, processes.world)
        options: Any = loading(
            self.task.workers, positions.local_batch * (3 + MASKS) * self.task.settings.image_size**2
        )
        loader = DataLoader(
            _Samples(self.task),
            batch_size=positions.local_batch,
            sampler=positions,
            collate_fn=list,
            pin_memory=self.device.type == "cuda",
            **options,
        )
        for iteration, batch in zip(range(start, settings.iterations), loader, strict=False):
            for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
                group["lr"] = peak * engine.lr_factor(settings, iteration)
            engine.seed_step(seed_of(self.task.seed, iteration, processes.rank))
            images = [image.to(self.device, non_blocking=True).float() / 255 for image, _ in batch]
            targets = [{k: v.to(self.device, non_blocking=True) for k, v in target.items()} for _, target in batch]
            with self.precision.autocast():
                losses = forward(images, targets)
                total = sum(losses.values(), torch.zeros((), device=self.device))
            self.optimizer.zero_grad(set_to_none=True)
            self.precision.scaler.scale(total).backward()
            self.precision.scaler.step(self.optimizer)
            self.precision.scaler.update()
            self._done = iteration + 1
            watch.add(total, iteration, images)
            after(self._done, self._read(total, losses) if self._done % engine.LOG_EVERY == 0 else None)

    def _read(self, total: Tensor, losses: dict[str, Tensor]) -> dict[str, float]:
        """Losses of this iteration, averaged over processes and copied to the host."""
        known = {name: ours for name, ours in LOSSES.items() if name in losses}
        values = torch.stack([total, *(losses[name] for name in known)]).detach()
        return dict(zip(["loss", *known.values()], self.task.processes.mean(values).tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        return {
            "iteration": self._done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
        }

    def resume(self, state: dict[str, Any]) -> int:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.load_scaler(state["scaler"])
        self._done = state["iteration"]
        return self._done

    @torch.no_grad()
    def predict(self, images: list[Tensor]) -> list[Prediction]:
        training = self.model.training
        self.model.eval()
        # Scaled as by the jitter; torchvision's transform would scale without antialiasing, and finds nothing left to scale.
        sizes = [scaled_size(image.shape[1], image.shape[2], self.task.settings.image_size) for image in images]
        scaled = [
            T.resize(image.to(self.device), size, antialias=True) for image, size in zip(images, sizes, strict=True)
        ]
        with self.precision.autocast():
            detections = self.model([image.float() / 255 for image in scaled])
        self.model.train(training)
        predictions = []
        for image, (h, w), x in zip(images, sizes, detections, strict=True):
            H, W = image.shape[1:]
            boxes = x["boxes"].float() * torch.tensor([W / w, H / h, W / w, H / h], device=self.device)
            masks = paste(x["crops"].float(), boxes, H, W).cpu() if "crops" in x else None
            predictions.append(Prediction(boxes.cpu(), x["scores"].cpu(), x["labels"].cpu() - 1, masks))
        return predictions

    def score(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        return coco_metrics(self.task.val, results)


class _Samples(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Training samples by position; labels start at 1, because 0 is torchvision's background."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getitem__(self, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        task = self.task
        index = image_at(position, len(task.train), task.seed)
        generator = torch.Generator().manual_seed(seed_of(task.seed, position))
        image, target = jitter(task.train.read(index), task.train.target(index), task.settings, generator)
        masks = {} if target.masks is None else {"masks": target.masks}
        return image, {"boxes": target.boxes, "labels": target.labels + 1, **masks}


def build_model(task: Task) -> GeneralizedRCNN:
    """Mask R-CNN for the classes of `task`, with random weights.

    Constants that are not settings are the same in torchvision's and detectron2's Mask R-CNN."""
    settings, S = task.settings, task.settings.image_size
    torch.manual_seed(task.seed)
    backbone = SimpleFeaturePyramid(task.encoder, settings)
    sides = strides(settings, task.encoder.patch_size)
    C, classes = settings.pyramid_dim, len(task.train.classes) + 1
    anchors = Anchors(
        sizes=tuple((engine.ANCHOR_STRIDES * stride,) for stride in (*sides, 2 * sides[-1])),
        aspect_ratios=((0.5, 1.0, 2.0),) * len(backbone.names),
    )
    proposals = RegionProposalNetwork(
        anchors,
        ProposalHead(C, anchors.num_anchors_per_location()[0], conv_depth=2),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * settings.proposals, "testing": settings.proposals},
        post_nms_top_n={"training": settings.proposals, "testing": settings.proposals},
        nms_thresh=0.7,
    )
    box_head = FastRCNNConvFCHead((C, 7, 7), [C] * settings.head_convs, [settings.head_dim], norm_layer=LayerNorm2d)
    box_predictor = FastRCNNPredictor(settings.head_dim, classes)
    mask_predictor = MaskRCNNPredictor(C, C, classes) if task.train.masks else None
    nn.init.normal_(box_predictor.cls_score.weight, std=0.01)
    nn.init.normal_(box_predictor.bbox_pred.weight, std=0.001)
    if mask_predictor is not None:
        nn.init.normal_(mask_predictor.mask_fcn_logits.weight, std=0.001)
    for layer in (box_predictor.cls_score, box_predictor.bbox_pred):
        nn.init.zeros_(layer.bias)
    heads = RoIHeads(
        AlignedPooler(backbone.names[:-1], sides, 7),
        box_head,
        box_predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=settings.rois,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        mask_roi_pool=AlignedPooler(backbone.names[:-1], sides, 14) if mask_predictor else None,
        mask_head=MaskRCNNHeads(C, [C] * settings.head_convs, 1, norm_layer=LayerNorm2d) if mask_predictor else None,
        mask_predictor=mask_predictor,
    )
    transform = GeneralizedRCNNTransform(
        S,
        S,
        list(task.mean),
        list(task.std),
        size_divisible=S,  # pad to the square
        _skip_resize=True,  # in training, where the jitter has resized the images
    )
    return GeneralizedRCNN(backbone, proposals, heads, transform)


# torchvision computes boxes in the type of what they are computed from. In bf16, 1,001 pixels are 1,000, so these two and
# `RoIHeads` give float32 in every precision, as detectron2's do.


class Anchors(AnchorGenerator):
    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)


class ProposalHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [y.float() for y in logits], [y.float() for y in deltas]


class RoIHeads(roi_heads.RoIHeads):
    """torchvision's heads with other mask targets and detections.

    torchvision cuts mask targets half a pixel off the regions that `AlignedPooler` pools, and pastes masks into boxes
    rounded to whole pixels: on objects of 16 pixels that costs 26 points of mask AP (docs/log.md)."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """(detections, losses), as in torchvision; losses are empty at a test, detections in training.

        A detection's masks are `crops`, probabilities (K, 1, m, m) over its boxes, for `paste`; without a mask head
        there are none."""
        if self.training:
            proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, deltas = (x.float() for x in self.box_predictor(self.box_head(pooled)))
        if not self.training:
            boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
            detected = {"boxes": boxes, "scores": scores, "labels": labels}
            if self.has_mask():
                logits = self._mask_logits(features, boxes, image_shapes)
                detected["crops"] = roi_heads.maskrcnn_inference(logits, labels)
            return [dict(zip(detected, image, strict=True)) for image in zip(*detected.values(), strict=True)], {}
        assert targets is not None
        loss_class, loss_box = roi_heads.fastrcnn_loss(logits, deltas, labels, regression)
        if not self.has_mask():
            return [], {"loss_classifier": loss_class, "loss_box_reg": loss_box}
        foreground = [torch.nonzero(of_image > 0).squeeze(1) for of_image in labels]
        boxes = [of_image[i] for of_image, i in zip(proposals, foreground, strict=True)]
        masks = self._mask_logits(features, boxes, image_shapes)
        mask_truth = [
            mask_targets(target["masks"], of_image, index[i], masks.shape[-1])
            for target, of_image, index, i in zip(targets, boxes, matched, foreground, strict=True)
        ]
        classes = torch.cat([of_image[i] for of_image, i in zip(labels, foreground, strict=True)])
        masks = masks[torch.arange(len(masks), device=masks.device), classes]
        # The mean over no masks would be NaN.
        loss_mask = F.binary_cross_entropy_with_logits(masks, torch.cat(mask_truth)) if len(masks) else masks.sum()
        return [], {"loss_classifier": loss_class, "loss_box_reg": loss_box, "loss_mask": loss_mask}

    def _mask_logits(self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> Tensor:
        """(sum K, classes + 1, m, m)."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, shapes)))


def mask_targets(masks: Tensor, boxes: Tensor, index: Tensor, side: int) -> Tensor:
    """The mask that the head should predict in each box.

    Args:
        masks: (I, H, W), the masks of an image's I instances.
        boxes: (K, 4), left, top, right, bottom in pixels of the image.
        index: (K,), the instance of each box.
        side: of the mask, in cells.

    Returns:
        (K, side, side), 1 where the instance covers at least half of a cell, else 0.
    """
    rois = torch.cat([index[:, None].to(boxes), boxes], dim=1)
    covered = roi_align(masks[:, None].to(boxes), rois, (side, side), aligned=True)
    return (covered[:, 0] >= 0.5).to(boxes)


def paste(crops: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks of an image from masks over boxes, the inverse of `mask_targets`.

    Args:
        crops: (K, 1, m, m), probabilities.
        boxes: (K, 4), left, top, right, bottom in pixels of the image.

    Returns:
        bool (K, height, width), true where the probability at a pixel's centre is at least 1/2.
    """
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=crops.device)
    rows, columns = (torch.arange(side, device=crops.device) + 0.5 for side in (height, width))  # centres of pixels
    for mask, crop, (left, top, right, bottom) in zip(masks, crops, boxes.tolist(), strict=True):
        y, x = (slice(max(0, math.floor(low)), math.ceil(high)) for low, high in ((top, bottom), (left, right)))
        across = (columns[x] - left) / (right - left) * 2 - 1  # the crop spans -1 to 1
        down = (rows[y] - top) / (bottom - top) * 2 - 1
        grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)  # (rows, columns, 2)
        mask[y, x] = F.grid_sample(crop[None], grid[None], align_corners=False)[0, 0] >= 0.5
    return masks


class AlignedPooler(MultiScaleRoIAlign):
    """torchvision's pooler without its shift of half a cell, which is a pixel or two on small images. detectron2's
    ROIAlignV2 has no shift either. Strides are given, because torchvision infers them from unpadded sizes."""

    def __init__(self, names: list[str], strides: tuple[int, ...], side: int) -> None:
        """side: the pooled map's, in cells."""
        super().__init__(names, output_size=side, sampling_ratio=0)
        self.strides = strides

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """x: level -> (B, C, ., .), boxes: B of (R, 4) in pixels of the padded image -> (sum R, C, side, side)."""
        maps = [x[name] for name in self.featmap_names]
        rois = torch.cat([torch.cat([b.new_full((len(b), 1), i), b], dim=1) for i, b in enumerate(boxes)])
        levels = self.levels(rois)
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        for level, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            rows = torch.nonzero(levels == level).squeeze(1)
            crops = roi_align(features, rois[rows], self.output_size, 1 / stride, self.sampling_ratio, aligned=True)
            pooled[rows] = crops.to(pooled.dtype)
        return pooled

    def levels(self, rois: Tensor) -> Tensor:
        """rois: (R, 5) -> (R,) in [0, levels): stride 16 for a side of 224 pixels, larger boxes on coarser levels (Feature
        Pyramid Networks, arXiv 1612.03144, equation 1)."""
        sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        log2_stride = torch.floor(4 + torch.log2(sides / 224 + 1e-8))
        finest = self.strides[0].bit_length() - 1
        return (log2_stride - finest).clamp(0, len(self.strides) - 1).long()


def parameter_groups(model: nn.Module, settings: DetectionSettings, depth: int) -> list[dict[str, Any]]:
    """Parameter groups with the layer-wise learning rate decay and the weight decay of ViTDet's release.

    The patch and position embeddings are layer 0, block i is layer i+1, everything else is layer depth+1. Layer depth+1
    has the full learning rate, each layer below `layer_decay` times that of the layer above. The encoder's norms and
    position embedding have no weight decay; the norms of the pyramid and heads have it, as in the release.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name, layer = f"{path}.{attribute}", depth + 1
            if name.startswith("backbone.net.blocks."):
                layer = int(name.split(".")[3]) + 1
            elif name.startswith("backbone.net."):
                layer = 0
            decays = attribute != "pos_embed" and type(module) is not nn.LayerNorm
            key = (settings.lr * settings.layer_decay ** (depth + 1 - layer), settings.weight_decay if decays else 0.0)
            groups.setdefault(key, []).append(parameter)
    return [{"params": members, "lr": lr, "weight_decay": decay} for (lr, decay), members in groups.items()]
