"""Line charts as SVG: panels side by side on white, a label at the end of each line."""

import math

import numpy as np

COLOURS = {"SFT+": "#c0392b", "RFT": "#8a8a8a", "Reward-SFT": "#c77c11", "DPO": "#1f77b4",
           "BCE": "#0b7d4f", "BCO": "#7d4fb0", "base": "#444444"}
WIDTH, HEIGHT = 440, 310  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 55, 345, 45, 255  # of the plot in it


def chart(panels) -> str:
    """An SVG of panels (title, label of x, {name: line}, logarithmic axes: "", "x", "y" or "xy").

    A line is a list of (x, y), numbers or arrays of one value a world: means are joined, worlds are
    pale dots (left out of lines of more than 12 points).
    """
    width = WIDTH * len(panels)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" '
             'font-family="sans-serif" font-size="12">'
             f'<rect width="{width}" height="{HEIGHT}" fill="white"/>']
    for i, panel in enumerate(panels):
        parts += [f'<g transform="translate({WIDTH * i} 0)">', *draw(*panel), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def draw(title, across, lines, logarithmic):
    """The SVG elements of one panel."""
    points = [np.broadcast_arrays(x, y) for line in lines.values() for x, y in line]
    at_x = axis([x for x, _ in points], "x" in logarithmic, LEFT, RIGHT)
    at_y = axis([y for _, y in points], "y" in logarithmic, BOTTOM, TOP)
    parts = [f'<text x="{LEFT}" y="24" font-size="13" font-weight="bold">{title}</text>',
             f'<text x="{(LEFT + RIGHT) // 2}" y="{HEIGHT - 12}" text-anchor="middle">{across}'
             "</text>"]
    for y in ticks([y for _, y in points], "y" in logarithmic):
        parts.append(f'<path d="M{LEFT} {at_y(y):.1f}H{RIGHT}" stroke="#e2e2e2"/><text '
                     f'x="{LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    places = sorted({float(f"{np.mean(x):.3g}") for x, _ in points})
    if len(places) > 4:
        places = ticks([x for x, _ in points], "x" in logarithmic)
    for x in places:
        parts.append(f'<text x="{at_x(x):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    ends = []
    for name, line in lines.items():
        means = [(at_x(np.mean(x)), at_y(np.mean(y))) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in means)
        dashes = "6 4" if name == "base" else "none"
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" '
                     f'stroke-width="2.2" stroke-dasharray="{dashes}"/>')
        if len(line) <= 12 and name != "base":
            worlds = [(at_x(x), at_y(y)) for point in line
                      for x, y in zip(*map(np.atleast_1d, np.broadcast_arrays(*point)))]
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{COLOURS[name]}" '
                      f'opacity="{opacity}"/>'
                      for dots, r, opacity in ((worlds, 2, 0.4), (means, 3.5, 1)) for x, y in dots]
        ends.append((means[-1][1], means[-1][0], name))
    ends.sort()
    lowest = -math.inf
    for i, (y, x, name) in enumerate(ends):  # labels that would overlap move apart
        lowest = min(max(y + 4, lowest + 14), BOTTOM + 30 - 14 * (len(ends) - 1 - i))
        parts.append(f'<path d="M{x + 5:.1f} {y:.1f}L{RIGHT + 12} {lowest - 4:.1f}" '
                     f'stroke="{COLOURS[name]}" stroke-width="0.6"/>'
                     f'<text x="{RIGHT + 15}" y="{lowest:.1f}" fill="{COLOURS[name]}" '
                     f'font-weight="bold">{name}</text>')
    return parts


def axis(values, logarithmic, start, end):
    """A function from a value to its place between two ends, with a margin."""
    def scale(value):
        return math.log10(value) if logarithmic else float(value)

    low, high = scale(np.min(values)), scale(np.max(values))
    margin = 0.05 * (high - low) or 1
    return lambda value: start + (end - start) * (scale(value) - low + margin) / (
        high - low + 2 * margin)


def ticks(values, logarithmic):
    """Round numbers among values."""
    low, high = np.min(values), np.max(values)
    if logarithmic:
        steps = (1, 2, 5) if high < 100 * low else (1,)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        inside = [k * 10.0**p for p in powers for k in steps]
    else:
        power = 10.0 ** math.floor(math.log10(max((high - low) / 5, 1e-9)))
        step = next(k for k in (1, 2, 5, 10) if 6 * k * power >= high - low) * power
        inside = [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]
    return [round(tick, 9) for tick in inside if low <= tick <= high]
