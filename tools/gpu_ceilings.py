"""What a device reaches at most: a large copy and large matrix products through torch. Prints one JSON object."""

import json
import statistics
import sys
import time

import torch

REPEATS = 10


def seconds(device: torch.device, work) -> float:
    """Median of some runs, after two to warm up."""
    times = []
    for _ in range(REPEATS + 2):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main() -> None:
    device = torch.device(sys.argv[1])
    tiny = device.type == "cpu"
    n = 256 if tiny else 8192
    values = torch.randint(-100, 100, (1 << (20 if tiny else 30),), dtype=torch.int8, device=device)
    into = torch.empty_like(values)
    # bytes read and bytes written
    found = {"device": str(device) if tiny else torch.cuda.get_device_name(device), "torch": torch.__version__,
             "copy_gb_per_s": 2e-9 * values.numel() / seconds(device, lambda: into.copy_(values))}  # fmt: skip
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
        found[f"{name}_tflops"] = 2e-12 * n**3 / seconds(device, lambda a=a, b=b: a @ b)
    if not tiny:
        a, b = (torch.randint(-100, 100, (n, n), device=device, dtype=torch.int8) for _ in range(2))
        found["int8_tops"] = 2e-12 * n**3 / seconds(device, lambda: torch._int_mm(a, b.t()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
