"""More tokens where neighbouring pixels differ: DFMR's rule on what the tower reads, so that the processor can decide.

The statistic is that of `feature_std` with the normalised pixels of a window of patches in place of its features.
`pixel_routing` takes it in NumPy before the model runs, and both agree exactly, on any device: pixels are rounded to
bfloat16 first, and all sums are whole numbers. So float32 and bfloat16 pixels give one result; pixels handed over in
float16 were rounded otherwise before, and may give another where the statistic meets a threshold to three digits.
Shapes: (V, 3, S, S) -> rungs (V,)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .pixel_statistics import PIXEL_STEPS, pixel_spread
from .router_window_spread import WindowSpreadRouter
from .visual_tokens import VisionFeatures


class PixelStdRouter(WindowSpreadRouter):
    """Choose by the spread of the pixels under pooling windows.

    Thresholds are in units of the normalised pixels, which differ with the image processor's mean and deviation.
    """

    type_name = "pixel_std"
    smallest_window = 1

    def check_grid(self, grid: tuple[int, int], image_size: tuple[int, int] | None = None) -> None:
        super().check_grid(grid, image_size)
        if not self.windows or image_size is None:
            return
        if any(pixels < patches for pixels, patches in zip(image_size, grid, strict=True)):
            raise ValueError(
                f"`router.type='pixel_std'` reads a mosaic's whole image, and its {image_size[0]}x{image_size[1]} "
                f"pixels are less than one for each of {grid[0]}x{grid[1]} patches. Use a smaller `tiling.n`, or "
                "another router."
            )

    def spreads(self, features: VisionFeatures, windows: Sequence[int]) -> list[Tensor]:
        steps = (features.pixels.bfloat16().double() * PIXEL_STEPS).round()
        return [pixel_spread(steps, features.grid, window).float() for window in windows]
