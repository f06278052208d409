"""Run one class's specimen as its file states it: `python families/try_specimen.py CLASS...`."""

import sys

import torch
from specimens import specimens

from ldpruner.operators import meta_copy
from ldpruner.operators.tracing import tensors_in

for name in sys.argv[1:]:
    specimen = specimens()[name]
    denoiser, call = specimen.build(), specimen.stated_call()
    with torch.no_grad():
        outputs = tensors_in(call.run(denoiser))
        again = tensors_in(call.run(specimen.build()))
    finite = all(bool(torch.isfinite(output).all()) for output in outputs)
    moved = all(bool(output.std() > 0) for output in outputs if output.numel() > 1)
    same = all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    params = sum(p.numel() for p in denoiser.parameters())
    print(
        f"{name}: {params} parameters, gives {[tuple(o.shape) for o in outputs]}, finite {finite}, not constant {moved}, same {same}"
    )
    try:
        call.to("meta").run(meta_copy(denoiser))
        print("  on meta: ok")
    except Exception as error:
        print(f"  on meta: {type(error).__name__}: {str(error)[:300]}")
