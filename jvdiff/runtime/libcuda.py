"""What NVIDIA's driver says of its GPUs, as one line of JSON. A program without JAX and without jvdiff: see `gpus`.

python libcuda.py             {"problem": null, "cuda": 12040, "gpus": [{"name": ..., "capability": ..., ...}]}
python libcuda.py --free      with the free memory of each, for which a context is made on it
"""

import ctypes
import json
import sys

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def main() -> None:
    """Prints the line; `problem` is the driver's own words."""
    found: dict = {"problem": None, "cuda": None, "gpus": []}
    try:
        _look(ctypes.CDLL("libcuda.so.1"), found)
    except (OSError, RuntimeError) as error:
        found["problem"] = str(error)
    print(json.dumps(found))


def _look(library, found: dict) -> None:
    def call(name: str, *arguments) -> None:
        if status := getattr(library, name)(*arguments):
            text = ctypes.c_char_p()
            library.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name} says {(text.value or b'').decode() or 'error'} ({status})")

    number, size, free = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_size_t()
    call("cuDriverGetVersion", ctypes.byref(number))
    found["cuda"] = number.value
    call("cuInit", 0)
    call("cuDeviceGetCount", ctypes.byref(number))
    for i in range(number.value):
        device, name, parts = ctypes.c_int(), ctypes.create_string_buffer(256), []
        call("cuDeviceGet", ctypes.byref(device), i)
        call("cuDeviceGetName", name, len(name), device)
        for attribute in (MAJOR, MINOR):
            call("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
            parts.append(number.value)
        call("cuDeviceTotalMem_v2", ctypes.byref(size), device)
        gpu = {"name": name.value.decode(), "capability": parts, "memory": size.value, "free": None}
        if "--free" in sys.argv:
            context = ctypes.c_void_p()
            call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            call("cuCtxSetCurrent", context)
            call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(size))
            gpu["free"] = free.value
        found["gpus"].append(gpu)


if __name__ == "__main__":
    main()
