"""The update as one pass over memory on the CPU: a small C kernel, compiled when first needed.

An optimizer's step is bound by memory. A chain of tensor operations reads and writes the weights many times, where one loop over
rows reads weight, gradient and moments once, with a row small enough to stay in the cache between its norms and its update. The
kernel below does what `optim.momentum_update` does with tensor operations, up to rounding, for contiguous fp32 tensors.

It needs a C compiler (`$CC`, cc, gcc or clang) and is compiled in a private temporary folder in a fraction of a second; nothing
is left on disk. Without a compiler the tensor operations are used. Rows are independent, so results do not depend on the number
of threads; they may differ in rounding between machines, as those of any optimised build.

Pitfalls: the kernel sees addresses only. `Piece` keeps the tensors alive and checks form and type before. Processes of one run
are to have equal arithmetic: where one of them has a compiler and another none, their weights drift apart by rounding; give
`fused=False` to all.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    float *w, *m, *v; const float *g; float *norm, *square;
    int64_t rows, cols; double rate;
} piece;

typedef struct {
    float moment, gradient, keep, take, scale, beta2, root, eps;  /* the direction */
    float lr, decay, coupled;                                     /* a plain step */
    float theta, average, correction, tiny; int32_t centred;      /* a rotation */
} settings;

enum { NONE, SIGN, RMS };
enum { PART = 1024 };  /* values summed in fp32 before they join a sum in double */

#define INLINE static inline __attribute__((always_inline))

INLINE float direction(const int kind, const settings *s, float m, float g, float *v) {
    float x = s->moment * m + s->gradient * g;
    if (kind == SIGN) return x != x ? x : s->scale * (float)((x > 0) - (x < 0));
    if (kind == RMS) {
        *v = s->beta2 * *v + (1 - s->beta2) * g * g;
        return s->scale * x / (sqrtf(*v) * s->root + s->eps);
    }
    return s->scale * x;
}

INLINE void plain(const int kind, const piece *p, const settings *s) {
    float *restrict w = p->w, *restrict m = p->m, *restrict v = p->v;
    const float *restrict g = p->g;
    const float keep = 1 - (float)(p->rate * s->decay), lr = (float)(p->rate * s->lr), unused = 0;
    const int64_t n = p->rows * p->cols;
    for (int64_t i = 0; i < n; i++) {
        float gi = g[i] + s->coupled * w[i], none = unused;
        float d = direction(kind, s, m[i], gi, kind == RMS ? v + i : &none);
        m[i] = s->keep * m[i] + s->take * gi;
        w[i] = keep * w[i] - lr * d;
    }
}

INLINE void turn(const int kind, const piece *p, const settings *s, float *restrict d) {
    const int64_t n = p->cols;
    const float theta = (float)(p->rate * s->theta), unused = 0;
    for (int64_t r = 0; r < p->rows; r++) {
        float *restrict w = p->w + r * n, *restrict m = p->m + r * n;
        float *restrict v = kind == RMS ? p->v + r * n : 0;
        const float *restrict g = p->g + r * n;
        double sum = 0, dot = 0, dd = 0, ww = 0;
        for (int64_t from = 0; from < n; from += PART) {
            const int64_t to = from + PART < n ? from + PART : n;
            float part = 0;
            for (int64_t i = from; i < to; i++) {
                float none = unused, x = direction(kind, s, m[i], g[i], kind == RMS ? v + i : &none);
                m[i] = s->keep * m[i] + s->take * g[i];
                d[i] = x;
                part += x;
            }
            sum += part;
        }
        const float mean = s->centred ? (float)(sum / n) : 0;
        for (int64_t from = 0; from < n; from += PART) {
            const int64_t to = from + PART < n ? from + PART : n;
            float a = 0, b = 0, c = 0;
            for (int64_t i = from; i < to; i++) {
                float x = d[i] - mean;
                a += x * w[i]; b += x * x; c += w[i] * w[i];
            }
            dot += a; dd += b; ww += c;
        }
        const double norm = p->norm[r], along = dot / (norm * norm);
        double side = dd - 2 * along * dot + along * along * ww;   /* |d|^2 without its radial part */
        if (side <= 1e-6 * dd) side = 0;
        const double square = s->average * p->square[r] + (1 - s->average) * side;
        p->square[r] = (float)square;
        const double b = side == 0 ? 0 : theta * norm / (sqrt(square / s->correction) + s->tiny), a = 1 + b * along;
        const double back = norm / sqrt(a * a * ww - 2 * a * b * dot + b * b * dd);
        const float of_w = (float)(back * a), of_d = (float)(back * b);
        for (int64_t i = 0; i < n; i++) w[i] = of_w * w[i] - of_d * (d[i] - mean);
    }
}

void plain_step(const piece *p, int64_t count, const settings *s, int kind) {
    for (int64_t k = 0; k < count; k++) {
        if (kind == NONE) plain(NONE, p + k, s);
        else if (kind == SIGN) plain(SIGN, p + k, s);
        else plain(RMS, p + k, s);
    }
}

int turn_step(const piece *p, int64_t count, const settings *s, int kind) {
    int64_t most = 0;
    for (int64_t k = 0; k < count; k++) if (p[k].cols > most) most = p[k].cols;
    float *d = malloc(most * sizeof(float));
    if (!d) return 1;
    for (int64_t k = 0; k < count; k++) {
        if (kind == NONE) turn(NONE, p + k, s, d);
        else if (kind == SIGN) turn(SIGN, p + k, s, d);
        else turn(RMS, p + k, s, d);
    }
    free(d);
    return 0;
}
"""
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros")
KINDS = {"none": 0, "sign": 1, "rms": 2}
FEW = 1 << 19  # values of a share below which a thread costs more than it saves
RECORD = np.dtype(
    [(name, np.uint64) for name in ("w", "m", "v", "g", "norm", "square")]
    + [("rows", np.int64), ("cols", np.int64), ("rate", np.float64)]
)
_FLOATS = (
    *("moment", "gradient", "keep", "take", "scale", "beta2", "root", "eps", "lr", "decay", "coupled"),
    *("theta", "average", "correction", "tiny"),
)


class Settings(ctypes.Structure):
    """The numbers of a step, as the kernel takes them."""

    _fields_ = [*((name, ctypes.c_float) for name in _FLOATS), ("centred", ctypes.c_int32)]


@cache
def library() -> Any | None:
    """The compiled kernel; None, with a warning, where no compiler makes it. Nothing here ends a training run."""
    names = dict.fromkeys([*([os.environ["CC"]] if os.environ.get("CC") else []), "cc", "gcc", "clang"])
    reason = "there is no C compiler (cc, gcc, clang, or what $CC names)"
    for compiler in filter(None, map(shutil.which, names)):
        try:
            return _compiled(compiler)
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            reason = f"{compiler} failed ({error})"
    warnings.warn(
        f"optimizer steps take tensor operations, which are slower than the compiled kernel: {reason}.", stacklevel=2
    )
    return None


def _compiled(compiler: str) -> Any:
    with tempfile.TemporaryDirectory(prefix="torchstone-", ignore_cleanup_errors=True) as folder:
        source, target = Path(folder, "update.c"), Path(folder, "update.so")
        source.write_text(SOURCE, encoding="ascii")
        command = [compiler, *FLAGS, "-shared", "-fPIC", str(source), "-o", str(target), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        found = ctypes.CDLL(str(target))
    for function in (found.plain_step, found.turn_step):
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(Settings), ctypes.c_int]
    found.plain_step.restype = None
    return found


def run(turning: bool, records: np.ndarray, settings: Settings, kind: str) -> None:
    """Update all pieces, shared out over torch's threads by their sizes."""
    function = library().turn_step if turning else library().plain_step  # type: ignore[union-attr]
    sizes = records["rows"] * records["cols"]
    count = max(1, min(torch.get_num_threads(), int(sizes.sum()) // FEW))
    shares = [share for share in _shares(records, sizes, count) if len(share)]
    failed: list[int] = []

    def work(share: np.ndarray) -> None:
        if function(share.ctypes.data, len(share), ctypes.byref(settings), KINDS[kind]):
            failed.append(1)

    threads = [threading.Thread(target=work, args=(share,)) for share in shares[1:]]
    for thread in threads:
        thread.start()
    work(shares[0])
    for thread in threads:
        thread.join()
    if failed:
        raise MemoryError("no memory for one row of an optimizer step")


def _shares(records: np.ndarray, sizes: np.ndarray, count: int) -> Sequence[np.ndarray]:
    """About equal amounts of work; whole pieces, in order."""
    if count == 1:
        return [records]
    ends = np.cumsum(sizes)
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count)
    return np.split(records, cuts)
