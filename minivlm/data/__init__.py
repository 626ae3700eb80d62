"""From files to samples: readers, images, validation, the checked data set on the disk, and features of its images.

A reader makes a `Sample` of each row; the processor encodes it as an `Example`; `FeatureStore` keeps what the frozen
encoder makes of the images.
"""
