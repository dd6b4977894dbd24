"use strict";
// Pictures as SVG text. A picture is redrawn at the width it has, so that text keeps its size on a phone.
Object.assign(bookjs, (() => {
  const BLUE = "#3b82c4", ORANGE = "#d9722e", GREEN = "#2e9e6b", PURPLE = "#b45fc4";
  const PAD = 34, TOP = 20; // room for the labels of the axes, in pixels
  const scale = (from, to, a, b) => (x) => a + ((x - from) / (to - from)) * (b - a);
  const text = (x, y, s, anchor = "middle") => `<text x="${x}" y="${y}" text-anchor="${anchor}">${s}</text>`;
  const line = (x1, y1, x2, y2, more = "") => `<path d="M${x1} ${y1}L${x2} ${y2}" ${more}/>`;
  const power = (e) => (e ? `10<tspan dy="-5" font-size="10">${String(e).replace("-", "−")}</tspan>` : "1");
  const curve = (points, more) => `<path d="M${points.map((q) => q.join(" ")).join("L")}" fill="none" ${more}/>`;
  const svg = (width, height, label, body) =>
    `<svg viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img" aria-label="${label}"
      fill="currentColor" stroke="none">${body}</svg>`;
  const axes = (width, height, name) => text(2, 11, name, "start")
    + `<path d="M${PAD} ${TOP}V${height - PAD}H${width - 4}" fill="none" stroke="currentColor"/>`;
  const START = 'stroke="currentColor" stroke-width="2" stroke-dasharray="3 3"';
  const GOAL = `stroke="${ORANGE}" stroke-width="4"`, CURVE = `stroke="${BLUE}" stroke-width="2.5"`;
  const below = (width, height, name) => text((width + PAD) / 2, height - 3, name);
  const point = ([x, y], style = `stroke="${BLUE}"`) => // in the colour of its curve
    `<circle cx="${x}" cy="${y}" r="6" fill="${style.match(/stroke="([^"]*)"/)[1]}" stroke="currentColor" stroke-width="1.5"/>`;

  // A bar per outcome and law, with a dashed mark where it starts and, if there is a goal, a thick one where it goes.
  function bars(width, height, label, laws, fills, start, goal, names) {
    const y = scale(0, 1, height - PAD, TOP), step = (width - PAD - 4) / names.length, wide = (0.64 / laws.length) * step;
    const one = (name, k) => {
      const x = PAD + step * (k + 0.5), mark = (u, style) => line(x - step * 0.42, y(u), x + step * 0.42, y(u), style);
      const bar = (law, i) => `<rect x="${x - step * 0.32 + i * wide}" y="${y(law[k])}" width="${wide * 0.9}"
        height="${y(0) - y(law[k])}" ${fills[i]}/>`;
      return laws.map(bar).join("") + mark(start[k], START) + (goal ? mark(goal[k], GOAL) : "")
        + text(x, height - PAD + 16, name);
    };
    return svg(width, height, label, axes(width, height, "probability") + below(width, height, "reward of the outcome")
      + [0, 0.5, 1].map((v) => text(PAD - 6, y(v) + 4, v, "end")).join("") + names.map(one).join(""));
  }
  const key = (mark, words) =>
    `<span><svg width="26" height="14" aria-hidden="true" fill="currentColor">${mark}</svg> ${words}</span>`;
  const SOFT = `fill="${BLUE}"`, NOISE = `fill="${GREEN}"`, HARD = 'fill="currentColor" opacity="0.4"';
  const bar = (fill) => `<rect x="6" width="14" height="14" ${fill}/>`;
  const DASH = line(0, 7, 26, 7, START), THICK = line(0, 7, 26, 7, GOAL);
  const digits = (x) => (x === 0 || x >= 1e-3 ? x.toPrecision(3) : `${x.toExponential(2).replace("e-", "·10<sup>−")}</sup>`);
  const rounded = (x) => (x < 1e-12 ? "below 10<sup>−12</sup>" : digits(x)); // no more is left of differences

  return {
    BLUE, ORANGE, GREEN, PURPLE, PAD, TOP, START, GOAL, CURVE, SOFT, NOISE, HARD, DASH, THICK,
    scale, text, line, power, curve, svg, axes, below, point, bars, key, bar, digits, rounded,
  };
})());
