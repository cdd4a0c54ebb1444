"""The data pipeline: shard sets, the order of their samples, decoding, augmentation and batches.

Only this package imports webdataset.
"""
