"""Charts of what was measured, as SVG or PNG: pairs of bars, or one bar for each way to decode."""

import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol
from xml.sax.saxutils import escape

from rich.cells import cell_len, set_cell_size

from dflash_mlx.cli.options import UsageError
from dflash_mlx.cli.screen import digits
from dflash_mlx.errors import DFlashError
from dflash_mlx.files import write_result
from dflash_mlx.measure.summary import Summary
from dflash_mlx.measure.sweep import Sweep

FORMATS = (".svg", ".png")

_WIDTH, _MARGIN, _LABELS, _VALUES, _ROW, _BAR = 760, 28, 150, 130, 58, 18
_MOST_LABELS = 400
_STEP = 26  # from one single bar to the next
_CHARACTER = 0.58  # of the size of the type
_INK, _QUIET, _PAPER, _PLAIN, _DFLASH = "#1f2328", "#6e7781", "#ffffff", "#b8c0c8", "#0f7b6c"
_OTHERS = "#8cc0b8"

_Anchor = Literal["start", "end"]


class Canvas(Protocol):
    """What a chart is drawn on; coordinates in pixels from the top left."""

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None: ...

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        color: str = _INK,
        bold: bool = False,
        anchor: _Anchor = "start",
    ) -> None:
        """Write on the base line y."""
        ...


def check_format(file: Path) -> None:
    """See that a chart can be written to a file.

    Raises:
        UsageError: its suffix is none of ours.
        DFlashError: it is .png and there is no Pillow.
    """
    if file.suffix.lower() not in FORMATS:
        raise UsageError(f"A chart is written as .svg or .png, and {file} is neither.")
    if file.suffix.lower() == ".png":
        _pillow()


def write_chart(
    file: Path, title: str, rows: Mapping[str, Summary], about: Mapping[str, Any]
) -> None:
    """Draw a comparison into a file whose suffix says how.

    Args:
        file: ends with .svg or .png.
        title: what was measured.
        rows: a summary for each pair of bars; the one called "overall" stands out.
        about: the machine.

    Raises:
        as `check_format`.
    """
    height = 118 + _ROW * len(rows)
    # A character is this wide at most on average; labels may widen the chart, but not without end.
    longest = max((cell_len(name) for name in rows), default=0)
    labels = min(max(_LABELS, round(_CHARACTER * 14 * longest) + 14), _MOST_LABELS)
    width = _WIDTH - _LABELS + labels
    draw = partial(_draw, title=title, rows=rows, about=about, width=width, labels=labels)
    _write(file, width, height, draw)


def write_sweep(
    file: Path, title: str, sweep: Sweep, run: Mapping[str, Summary], about: Mapping[str, Any]
) -> None:
    """Draw plain decoding, every verify length and tree of a sweep, and what was run, by its name.

    Raises:
        as `check_format`.
    """
    ((name, total),) = run.items()
    bars = {"plain mlx_lm": (total.plain.generation_tps, digits(total.plain.generation_tps))}
    lengths = {str(n): s for n, s in sweep.lengths.items()}
    trees = {f"tree {n}": s for n, s in sweep.trees.items()}
    for label, s in {**lengths, **trees, name: total}.items():
        tps = s.dflash.generation_tps
        bars[label] = tps, f"{digits(tps)}, {s.speedup:.2f}x"
    write_bars(file, title, bars, about, marked=name)


def write_bars(
    file: Path,
    title: str,
    bars: Mapping[str, tuple[float, str]],
    about: Mapping[str, Any],
    *,
    marked: str | None = None,
) -> None:
    """Draw one bar for each of several ways to decode, into a file whose suffix says how.

    Args:
        file: ends with .svg or .png.
        title: what was measured.
        bars: how long each is, and what is written behind it; the others are measured by the first.
        about: the machine.
        marked: the one that stands out.

    Raises:
        as `check_format`.
    """
    height, longest = 94 + _STEP * len(bars), max(length for length, _ in bars.values())
    left, room = _MARGIN + _LABELS, _WIDTH - 2 * _MARGIN - _LABELS - _VALUES

    def draw(canvas: Canvas) -> None:
        canvas.text(_MARGIN, 38, _fitting(title, _WIDTH - 2 * _MARGIN, 18), size=18, bold=True)
        for i, (name, (value, written)) in enumerate(bars.items()):
            y, length = 58 + i * _STEP, max(1.0, room * value / longest if longest else 0.0)
            color, bold = _OTHERS if i else _PLAIN, name == marked
            canvas.text(left - 14, y + 14, _fitting(name, _LABELS - 14), anchor="end", bold=bold)
            canvas.bar(left, y, length, _BAR, _DFLASH if bold else color)
            canvas.text(left + length + 8, y + 14, written, size=13, bold=bold)
        _footer(canvas, about, _WIDTH, height)

    _write(file, _WIDTH, height, draw)


def _write(file: Path, width: int, height: int, draw: Callable[[Canvas], None]) -> None:
    check_format(file)
    if file.suffix.lower() == ".svg":
        svg = _Svg(width, height)
        draw(svg)
        write_result(file, svg.document())
    else:
        png = _Png(width, height)
        draw(png)
        data = io.BytesIO()
        png.image.save(data, "PNG")
        write_result(file, data.getvalue())


def _fitting(text: str, room: float, size: int = 14) -> str:
    """A text that is no wider than the room for it; what does not fit is left out at the end."""
    most = int(room / (_CHARACTER * size))
    return text if cell_len(text) <= most else set_cell_size(text, most - 1).rstrip() + "…"


def _draw(
    canvas: Canvas,
    title: str,
    rows: Mapping[str, Summary],
    about: Mapping[str, Any],
    width: int,
    labels: int,
) -> None:
    canvas.text(_MARGIN, 38, _fitting(title, width - 2 * _MARGIN, 18), size=18, bold=True)
    canvas.bar(_MARGIN, 54, 12, 12, _PLAIN)
    canvas.text(_MARGIN + 18, 65, "plain mlx_lm", size=13, color=_QUIET)
    canvas.bar(_MARGIN + 116, 54, 12, 12, _DFLASH)
    canvas.text(_MARGIN + 134, 65, "DFlash", size=13, color=_QUIET)
    fastest = max(max(s.plain.generation_tps, s.dflash.generation_tps) for s in rows.values())
    left, room = _MARGIN + labels, width - 2 * _MARGIN - labels - _VALUES
    for i, (name, s) in enumerate(rows.items()):
        y = 84 + i * _ROW
        bold = name == "overall"
        name = _fitting(name, labels - 14)
        canvas.text(left - 14, y + _BAR + 5, name, anchor="end", bold=bold)
        for j, (tps, color) in enumerate(
            ((s.plain.generation_tps, _PLAIN), (s.dflash.generation_tps, _DFLASH))
        ):
            length = max(1.0, room * tps / fastest) if fastest else 1.0
            canvas.bar(left, y + j * (_BAR + 2), length, _BAR, color)
            canvas.text(left + length + 8, y + j * (_BAR + 2) + 14, digits(tps), size=13)
        canvas.text(
            width - _MARGIN, y + _BAR + 6, f"{s.speedup:.2f}x", size=17, bold=True, anchor="end"
        )
    _footer(canvas, about, width, 118 + _ROW * len(rows))


def _footer(canvas: Canvas, about: Mapping[str, Any], width: int, height: int) -> None:
    versions = about["versions"]
    canvas.text(
        _MARGIN,
        height - 18,
        _fitting(
            f"{about['chip']}, {about['memory_gb']:.0f} GB, mlx {versions['mlx']}, "
            f"mlx-lm {versions['mlx-lm']}, dflash-mlx {versions['dflash-mlx']}",
            width - 2 * _MARGIN,
            12,
        ),
        size=12,
        color=_QUIET,
    )


class _Svg:
    def __init__(self, width: int, height: int):
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" '
            'font-family="-apple-system, Helvetica, Arial, sans-serif">',
            f'<rect width="{width}" height="{height}" rx="8" fill="{_PAPER}"/>',
        ]

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" '
            f'fill="{color}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        color: str = _INK,
        bold: bool = False,
        anchor: _Anchor = "start",
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}"{weight} '
            f'text-anchor="{anchor}">{escape(text)}</text>'
        )

    def document(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])


class _Png:
    scale = 2  # sharp on high-resolution screens

    def __init__(self, width: int, height: int):
        image, draw, self._font = _pillow()
        self.image = image.new("RGB", (width * self.scale, height * self.scale), _PAPER)
        self._draw = draw.Draw(self.image)

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        k = self.scale
        box = (x * k, y * k, (x + width) * k - 1, (y + height) * k - 1)
        self._draw.rounded_rectangle(box, radius=2 * k, fill=color)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        color: str = _INK,
        bold: bool = False,
        anchor: _Anchor = "start",
    ) -> None:
        k = self.scale
        self._draw.text(
            (x * k, y * k),
            text,
            font=self._font.load_default(size * k),
            fill=color,
            anchor="rs" if anchor == "end" else "ls",
            stroke_width=0.5 * k if bold else 0,
            stroke_fill=color,
        )


def _pillow() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise DFlashError(
            "A PNG chart needs Pillow: pip install 'dflash-mlx[png]', or write .svg, which needs "
            "nothing."
        ) from error
    return Image, ImageDraw, ImageFont
