"""Engine detectron2: detectron2's ViTDet (ViT, SimpleFeaturePyramid, Mask R-CNN), trainer, augmentation and evaluator.

The configuration is a LazyConfig made here from the settings. detectron2's configuration files are not used, so any
version of it that imports will do. Its trainer, schedule and layer-wise decay are used as they are. Images come in the
order of `aps.detection.annotations`, and checkpoints are the stage's, because detectron2's are not saved on a signal and
do not keep the data order.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import SimpleFeaturePyramid, ViT
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import Tensor, nn
from torch.utils.data import Dataset

from aps.detection import engine
from aps.detection.annotations import CocoSplit, Packed, Positions, image_at, seed_of
from aps.detection.engine import After, Prediction, Task
from aps.detection.geometry import positions_grid, strides
from aps.detection.score import class_precision, coco_metrics, metrics_by_key
from aps.errors import UserError
from aps.models.archs import dimensions
from aps.runtime.precision import Precision
from aps.settings.blocks import DetectionSettings, EncoderSettings

# detectron2's names of the losses -> ours.
LOSSES = {
    "total_loss": "loss",
    "loss_rpn_cls": "loss_proposal_class",
    "loss_rpn_loc": "loss_proposal_box",
    "loss_cls": "loss_class",
    "loss_box_reg": "loss_box",
    "loss_mask": "loss_mask",
}


class Engine(engine.Engine):
    def __init__(self, task: Task) -> None:
        super().__init__(task)
        settings, device = task.settings, task.processes.device
        self.precision = Precision(settings.precision, device)
        if device.type == "cpu" and self.precision.name != "fp32":
            raise UserError(
                f"detection.precision {settings.precision}: engine detectron2 computes in fp32 on CPUs; set precision: auto"
            )
        register(task.train)
        register(task.val)
        torch.manual_seed(task.seed)
        self.model = instantiate(model_config(task)).to(device)
        parallel = create_ddp_model(
            self.model,
            fp16_compression=device.type == "cuda" and self.precision.name != "fp32",
            broadcast_buffers=False,
            device_ids=[device.index] if device.type == "cuda" else None,
        )
        optimizer = optimizer_config(settings, dimensions(task.encoder).depth)
        optimizer.params.model = self.model
        arguments = {"data_loader": None, "optimizer": instantiate(optimizer), "gather_metric_period": engine.LOG_EVERY}
        if self.precision.name == "fp32":
            self.trainer = SimpleTrainer(parallel, **arguments)
        else:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision.name]
            self.trainer = AMPTrainer(parallel, grad_scaler=self.precision.scaler, precision=dtype, **arguments)

    def train(self, start: int, after: After) -> None:
        settings = self.task.settings
        self.model.train()
        # The iterator draws a seed when it is made; made here, it does not change the draws of an iteration.
        self.trainer.data_loader = iter(loader(self.task, start))
        self.trainer.register_hooks(
            [
                _Seeds(self.task),
                hooks.LRScheduler(scheduler=instantiate(schedule_config(settings))),
                _After(after),
            ]
        )
        try:
            with _quiet("detectron2.engine.train_loop"):
                self.trainer.train(start, settings.iterations)
        except FloatingPointError as error:
            raise UserError(f"detection: {' '.join(str(error).split())}; lower detection.lr") from None

    def state(self) -> dict[str, Any]:
        return {"trainer": self.trainer.state_dict(), "model": self.model.state_dict()}

    def resume(self, state: dict[str, Any]) -> int:
        self.model.load_state_dict(state["model"])
        # The scheduler's state is left out: training makes a new scheduler at the iteration where it starts.
        self.trainer.load_state_dict({k: v for k, v in state["trainer"].items() if k != "hooks"})
        return int(self.trainer.iter) + 1

    @torch.no_grad()
    def predict(self, images: list[Tensor]) -> list[Prediction]:
        training = self.model.training
        self.model.eval()
        S = self.task.settings.image_size
        resize = T.ResizeShortestEdge(short_edge_length=S, max_size=S)
        inputs = []
        for image in images:
            H, W = image.shape[-2:]
            pixels = resize.get_transform(image.permute(1, 2, 0).numpy())
            scaled = pixels.apply_image(image.permute(1, 2, 0).numpy())
            inputs.append({"image": torch.from_numpy(scaled.transpose(2, 0, 1).copy()), "height": H, "width": W})
        with self.precision.autocast():
            instances = [output["instances"].to("cpu") for output in self.model(inputs)]
        self.model.train(training)
        masks = [x.pred_masks if x.has("pred_masks") else None for x in instances]
        return [
            Prediction(x.pred_boxes.tensor, x.scores, x.pred_classes, mask)
            for x, mask in zip(instances, masks, strict=True)
        ]

    def score(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        val = self.task.val
        if not results:  # detectron2's evaluator gives no metrics without detections
            return coco_metrics(val, results)
        tasks = ("bbox", "segm") if val.masks else ("bbox",)
        evaluator = _Evaluator(val.name, tasks=tasks, distributed=False)
        evaluator.reset()
        label_of = {category: label for label, category in enumerate(val.categories)}
        rows = [{**row, "category_id": label_of[row["category_id"]]} for row in results]
        evaluator.process([{"rows": rows}], [{}])
        with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
            found = evaluator.evaluate()
        metrics = {key: value for task in tasks for key, value in found[task].items()}
        return {**metrics, "per_class": evaluator.per_class}


# --------------------------------------------------------------------------------------------------
# The configuration.


def backbone_config(encoder: EncoderSettings, settings: DetectionSettings) -> Any:
    """SimpleFeaturePyramid on ViT; instantiates to a backbone whose levels are named p{log2 stride}."""
    dim, depth, heads = dimensions(encoder)
    windowed = [i for i in range(depth) if settings.window and i not in settings.global_blocks]
    coarsest = strides(settings, encoder.patch_size)[-1].bit_length() - 1
    return L(SimpleFeaturePyramid)(
        net=L(ViT)(
            img_size=settings.image_size,
            patch_size=encoder.patch_size,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            mlp_ratio=encoder.mlp_ratio,
            qkv_bias=encoder.qkv_bias,
            drop_path_rate=settings.drop_path,
            norm_layer=partial(nn.LayerNorm, eps=encoder.layer_norm_eps),
            window_size=settings.window,
            window_block_indexes=windowed,
            use_rel_pos=settings.relative_position,
            pretrain_img_size=positions_grid(settings, encoder) * encoder.patch_size,
            pretrain_use_cls_token=False,  # our position embedding has no row for the class token
            out_feature="last_feat",
        ),
        in_feature="last_feat",
        out_channels=settings.pyramid_dim,
        scale_factors=settings.pyramid_scales,
        top_block=L(subsample)(level=f"p{coarsest}"),
        norm="LN",
        square_pad=settings.image_size,
    )


def subsample(level: str) -> LastLevelMaxPool:
    """One more level from the coarsest; without `in_feature` detectron2 would take p5 for it."""
    block = LastLevelMaxPool()
    block.in_feature = level
    return block


def model_config(task: Task) -> Any:
    """Mask R-CNN with ViTDet's heads."""
    settings, encoder = task.settings, task.encoder
    levels_of = strides(settings, encoder.patch_size)
    sides = (*levels_of, 2 * levels_of[-1])
    levels = [f"p{side.bit_length() - 1}" for side in sides]
    pooled = {"scales": [1 / stride for stride in sides[:-1]], "sampling_ratio": 0, "pooler_type": "ROIAlignV2"}
    C, classes = settings.pyramid_dim, len(task.train.classes)
    masks = {
        "mask_in_features": levels[:-1],
        "mask_pooler": L(ROIPooler)(output_size=14, **pooled),
        "mask_head": L(MaskRCNNConvUpsampleHead)(
            input_shape=ShapeSpec(channels=C, width=14, height=14),
            num_classes=classes,
            conv_dims=[C] * (settings.head_convs + 1),  # the last is that of the upsampling layer
            conv_norm="LN",
        ),
    }
    return L(GeneralizedRCNN)(
        backbone=backbone_config(encoder, settings),
        proposal_generator=L(RPN)(
            in_features=levels,
            head=L(StandardRPNHead)(in_channels=C, num_anchors=3, conv_dims=[-1, -1]),
            anchor_generator=L(DefaultAnchorGenerator)(
                sizes=[[engine.ANCHOR_STRIDES * stride] for stride in sides],
                aspect_ratios=[0.5, 1.0, 2.0],
                strides=list(sides),
                offset=0.0,
            ),
            anchor_matcher=L(Matcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True),
            box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_topk=(2 * settings.proposals, settings.proposals),
            post_nms_topk=(settings.proposals, settings.proposals),
            nms_thresh=0.7,
        ),
        roi_heads=L(StandardROIHeads)(
            num_classes=classes,
            batch_size_per_image=settings.rois,
            positive_fraction=0.25,
            proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
            box_in_features=levels[:-1],
            box_pooler=L(ROIPooler)(output_size=7, **pooled),
            box_head=L(FastRCNNConvFCHead)(
                input_shape=ShapeSpec(channels=C, height=7, width=7),
                conv_dims=[C] * settings.head_convs,
                fc_dims=[settings.head_dim],
                conv_norm="LN",
            ),
            box_predictor=L(FastRCNNOutputLayers)(
                input_shape=ShapeSpec(channels=settings.head_dim),
                test_score_thresh=0.05,
                box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
                num_classes=classes,
            ),
            **(masks if task.train.masks else {}),
        ),
        pixel_mean=[255 * value for value in task.mean],
        pixel_std=[255 * value for value in task.std],
        input_format="RGB",
    )


def optimizer_config(settings: DetectionSettings, depth: int) -> Any:
    return L(torch.optim.AdamW)(
        params=L(get_default_optimizer_params)(
            base_lr=settings.lr,
            weight_decay_norm=0.0,
            lr_factor_func=partial(get_vit_lr_decay_rate, lr_decay_rate=settings.layer_decay, num_layers=depth),
            overrides={"pos_embed": {"weight_decay": 0.0}},
        ),
        lr=settings.lr,
        betas=(0.9, 0.999),
        weight_decay=settings.weight_decay,
    )


def schedule_config(settings: DetectionSettings) -> Any:
    drops = engine.milestones(settings)
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[0.1**number for number in range(len(drops) + 1)], milestones=drops, num_updates=settings.iterations
        ),
        warmup_length=settings.warmup_iterations / settings.iterations,
        warmup_factor=engine.WARMUP_FACTOR,
    )


def loader(task: Task, start: int) -> Any:
    """The training loader, with ViTDet's large-scale jitter and without grouping by aspect ratio, which reorders images."""
    settings, S = task.settings, task.settings.image_size
    mapper = L(DatasetMapper)(
        is_train=True,
        augmentations=[
            L(T.RandomFlip)(prob=settings.flip, horizontal=True),
            L(T.ResizeScale)(
                min_scale=settings.jitter_scale[0], max_scale=settings.jitter_scale[1], target_height=S, target_width=S
            ),
            L(T.FixedSizeCrop)(crop_size=(S, S), pad=False),
        ],
        image_format="RGB",
        use_instance_mask=task.train.masks,
        instance_mask_format="bitmask" if task.train.run_lengths else "polygon",
        recompute_boxes=task.train.masks,  # from the masks, where there are masks
    )
    return build_detection_train_loader(
        dataset=_Samples(task, instantiate(mapper)),
        mapper=None,
        sampler=Positions(settings.batch_size, start, task.processes.rank, task.processes.world),
        total_batch_size=settings.batch_size,
        aspect_ratio_grouping=False,
        num_workers=task.workers,
    )


# --------------------------------------------------------------------------------------------------
# Adapters between detectron2 and the stage.


def register(split: CocoSplit) -> None:
    """Register a split with detectron2 by its name; again each time, because its files may have moved."""
    if split.name in DatasetCatalog:
        DatasetCatalog.remove(split.name)
        MetadataCatalog.remove(split.name)
    register_coco_instances(split.name, {}, str(split.annotations), str(split.folder))
    DatasetCatalog.get(split.name)  # fills in the classes


class _Samples(Dataset[dict[str, Any]]):
    """Training samples by position, through detectron2's mapper."""

    def __init__(self, task: Task, mapper: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.seed, self.mapper = task.seed, mapper
        known = set(task.train.ids)
        every = get_detection_dataset_dicts(task.train.name, filter_empty=True)
        records = [record for record in every if record["image_id"] in known]
        if [record["image_id"] for record in records] != task.train.ids:
            raise RuntimeError(f"detectron2 and aps disagree on the training images of {task.train.name}")
        self.records = Packed(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, position: int) -> dict[str, Any]:
        np.random.seed(seed_of(self.seed, position))
        return self.mapper(self.records[image_at(position, len(self.records), self.seed)])


class _Seeds(HookBase):
    def __init__(self, task: Task) -> None:
        self.task = task

    def before_step(self) -> None:
        engine.seed_step(seed_of(self.task.seed, self.trainer.iter, self.task.processes.rank))


class _After(HookBase):
    def __init__(self, after: After) -> None:
        self.after = after

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        latest = self.trainer.storage.latest() if done % engine.LOG_EVERY == 0 else {}
        values = {ours: latest[theirs][0] for theirs, ours in LOSSES.items() if theirs in latest}
        self.after(done, values or None)


class _Evaluator(COCOEvaluator):
    """COCOEvaluator for detections that are in COCO's format already; it also keeps recall and the AP of each class."""

    def reset(self) -> None:
        super().reset()
        self.per_class: dict[str, dict[str, float]] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        self._predictions += [{"instances": each["rows"]} for each in inputs]

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: list[str]) -> dict[str, float]:
        name = {"bbox": "box", "segm": "mask"}[iou_type]
        self.per_class[f"{name}_AP"] = class_precision(tuple(class_names), coco_eval.eval["precision"])
        return metrics_by_key(name, coco_eval.stats)


class _quiet:  # noqa: N801
    """Silences a logger: detectron2 logs a traceback whenever training ends early, and the stage reports that itself."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.before, self.logger.disabled = self.logger.disabled, True

    def __exit__(self, *_: object) -> None:
        self.logger.disabled = self.before
