"""DALI's part of decoding. Imported where an image needs it: the package takes seconds to load."""

from nvidia.dali import fn, pipeline_def, types

__all__ = ["pipeline"]

# The dynamic executor, in step: after an error the others are dead, or blame the next batch.
_EXECUTOR = {
    "prefetch_queue_depth": 1,
    "exec_pipelined": False,
    "exec_async": False,
    "exec_dynamic": True,
}


@pipeline_def(**_EXECUTOR)
def pipeline(device: str, pixels: int, hardware: float):
    """Parts of images; on a GPU (`mixed`) resized to views, mirrored where the ends of an axis are
    swapped. On a CPU torch resizes several times faster."""

    def column(name: str, dtype: types.DALIDataType):
        return fn.external_source(name=name, dtype=dtype, ndim=1)

    part = fn.decoders.image_slice(
        column("encoded", types.UINT8),
        device=device,
        hw_decoder_load=hardware,
        output_type=types.RGB,
        start=column("start", types.INT32),
        shape=column("shape", types.INT32),
        axis_names="HW",
    )
    if device == "cpu":
        return part
    return fn.resize(
        part,
        size=[pixels, pixels],
        roi_start=column("low", types.FLOAT),
        roi_end=column("high", types.FLOAT),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )
