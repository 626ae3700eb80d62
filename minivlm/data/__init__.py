"""From files to samples: readers, images, validation, the checked data set on the disk, and features of its images.

A reader makes a `Sample` of each row; the processor encodes it as an `Example`; `FeatureStore` keeps what the frozen
encoder makes of the images.
"""

from importlib import import_module

from minivlm.data.images import ImageError, ImageSource, open_image
from minivlm.data.samples import Example, Sample, SampleError

# Imported when they are asked for: `import minivlm` needs none of them.
_LAZY = {
    "DatasetError": "dataset",
    "FeatureError": "features",
    "FeatureStore": "features",
    "SampleDataset": "dataset",
    "encode": "features",
    "encode_images": "features",
    "open_dataset": "dataset",
    "write_dataset": "dataset",
}
__all__ = ["Example", "ImageError", "ImageSource", "Sample", "SampleError", "open_image", *_LAZY]


def __getattr__(name: str):
    """A public name of a module that is imported only now."""
    if name in _LAZY:
        return getattr(import_module(f"minivlm.data.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'minivlm.data' has no attribute {name!r}")
