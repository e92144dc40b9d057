"""Models of pytorchvideo as classifiers, to compare with: the same data, training, evaluation and benchmark.

The library builds the model; nothing of its computation changes. `LibraryClassifier` gives it the parts of our
`Classifier` that the rest of this package uses. Only models are imported: its transforms fail on today's torchvision.

Letters: B clips, C T H W their channels, frames and pixels; t h w the places that a convolutional head sees, K classes.
"""

from __future__ import annotations

import warnings
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_convmae.errors import UserError

from .classifier import check_num_classes, init_head
from .sizes import LIBRARY, ClassifierConfig, library_model

ALPHA = 4  # SlowFast: frames of the fast pathway for one of the slow


class LibraryClassifier(nn.Module):
    """A model of pytorchvideo that maps a clip to logits.

    The head differs in three ways, none of which changes what is learnt or the shapes of the parameters:

    - It gives logits. X3D and R(2+1)D end with a softmax over each place, then the mean over places: here the logarithm
      of that, whose softmax is the library's output.
    - Its pooling, made for clips as in training, is as large as the clip allows where that is smaller. Larger clips are
      pooled at several places, as in the published tests.
    - `head_dropout` is its dropout (0.5 in the published training, here 0 unless set).

    Args:
        config: with a size `pytorchvideo/NAME`.
        num_classes: K.

    Raises:
        UserError: pytorchvideo is not installed.
        ValueError: fewer than one class, or a size of ours.
    """

    slow_frames: Tensor  # of SlowFast: those of the slow pathway, a buffer

    def __init__(self, config: ClassifierConfig, num_classes: int) -> None:
        super().__init__()
        check_num_classes(num_classes)
        if not config.of_library:
            raise ValueError(f"size is {config.size!r}; expected {LIBRARY}NAME in a LibraryClassifier")
        self.config = config
        self.num_classes = num_classes
        self.net = build_net(config, num_classes)
        head = self._head
        head.dropout = nn.Dropout(config.head_dropout)
        if head.activation is not None:
            head.activation, head.output_pool = None, MeanOfProbabilities()
        _fit_pools(self.net)
        if config.head_init_std is not None:
            init_head(self.projection, config.head_init_std)
        frames = torch.linspace(0, config.num_frames - 1, max(1, config.num_frames // ALPHA)).long()
        self._has_pathways = config.size.startswith(f"{LIBRARY}slowfast")
        self.register_buffer("slow_frames", frames if self._has_pathways else None, persistent=False)

    @property
    def _head(self) -> Any:
        return self.net.head if hasattr(self.net, "head") else self.net.blocks[-1]  # MViT; all others

    @property
    def projection(self) -> nn.Linear:
        """The last linear layer, which has a row a class."""
        return self._head.proj

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips `(B, C, T, H, W)` to logits `(B, K)`."""
        if clips.shape[1:] != self.config.clip_shape:
            raise ValueError(f"clips are {tuple(clips.shape)}; expected (B, *{self.config.clip_shape})")
        if self._has_pathways:
            return self.net([clips.index_select(2, self.slow_frames), clips])
        return self.net(clips)

    def pooled(self, clips: Tensor) -> Tensor:
        """Map clips `(B, C, T, H, W)` to what the projection reads, `(B, D)`: the mean over the places."""
        read: list[Tensor] = []
        hook = self.projection.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            self(clips)
        finally:
            hook.remove()
        return read[0].flatten(1, -2).mean(dim=1) if read[0].ndim > 2 else read[0]

    def multiply_adds(self) -> dict[str, int]:
        """Return the forward multiply-adds of one clip as fvcore counts them, which counts norms too."""
        from fvcore.nn import FlopCountAnalysis

        clip = torch.zeros(1, *self.config.clip_shape, device=self.projection.weight.device)
        training = self.training
        self.eval()  # its trace is a forward pass, which would change running statistics
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counter = FlopCountAnalysis(self, clip).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            total = counter.total()
        self.train(training)
        return {"net": int(total)}


class MeanOfProbabilities(nn.Module):
    """The logarithm of the mean over places of the softmax over classes; of one place, the logits as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, K, t, h, w)` -> `(B, K, 1, 1, 1)`."""
        flat = x.flatten(2)
        if flat.shape[2] > 1:
            flat = F.log_softmax(flat.float(), dim=1).logsumexp(dim=2, keepdim=True) - log(flat.shape[2])
        return flat[..., None, None]


class FittingPool(nn.AvgPool3d):
    """Average pooling whose window is no larger than its input."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> `(B, C, t, h, w)`."""
        assert isinstance(self.kernel_size, tuple)
        window = [min(int(side), size) for side, size in zip(self.kernel_size, x.shape[2:])]
        return F.avg_pool3d(x, window, stride=1)


def build_net(config: ClassifierConfig, num_classes: int) -> Any:
    """Return the library's own model with random weights, of as many classes.

    Raises:
        UserError: pytorchvideo is not installed.
    """
    library_model(config.size)
    name = config.size.removeprefix(LIBRARY)
    arguments: dict[str, Any] = {"model_num_class": num_classes}
    if name.startswith("mvit"):
        arguments = {
            "head_num_classes": num_classes,
            "spatial_size": config.clip_shape[2:],
            "temporal_size": config.num_frames,
            "droppath_rate_block": config.drop_path,
        }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
        try:
            from pytorchvideo.models import hub
        except ImportError as error:
            raise UserError(
                f"model.size {config.size} needs pytorchvideo ({error}): pip install 'video-convmae[baselines]'"
            ) from error
        return getattr(hub, name)(**arguments)


def _fit_pools(net: nn.Module) -> None:
    """Replace the head's average pooling, of a fixed window, by one that fits smaller clips too."""
    for parent in list(net.modules()):
        for name, pool in parent.named_children():
            if isinstance(pool, nn.AvgPool3d):
                setattr(parent, name, FittingPool(pool.kernel_size, stride=1))
