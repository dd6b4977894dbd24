"use strict";
(() => {
  const { dot, tilt, kl, PAD, TOP, START, CURVE, SOFT, DASH } = bookjs;
  const { scale, text, line, curve, svg, axes, below, point, bars, key, bar, digits, control, decades } = bookjs;

  bookjs.explorable("tilt", (root, { p = [0.14, 0.3, 0.28, 0.15, 0.07, 0.035, 0.015, 0.007, 0.003], rewards: r = [...p.keys()], beta = 2 }) => {
    const getBeta = control(root, "β", "temperature", decades(-1, 2).reverse(), beta);
    root.querySelector(".bk-key").innerHTML = key(bar(SOFT), "<i>π*</i>, the tilt")
      + key(DASH, "<i>p</i>, the reference, and the tangent of slope <i>β</i>");
    const start = dot(p, r), top = Math.max(...r), far = 1.1 * kl(tilt(p, r, 0.01), p);
    const finely = Array.from({ length: 121 }, (_, i) => tilt(p, r, 10 ** (2 - i / 40)));
    const frontier = [[0, start], ...finely.map((pi) => [kl(pi, p), dot(pi, r)]), [far, top]];
    return (width, height, panels) => {
      const b = getBeta(), pi = tilt(p, r, b), mean = dot(pi, r), cost = kl(pi, p);
      panels[0].innerHTML = bars(width, height, "Probability of each outcome", [pi], [SOFT], p, null, r);

      const x = scale(0, far, PAD, width - 4), y = scale(start - 0.12 * (top - start), top, height - PAD, TOP + 8);
      const path = frontier.map(([u, v]) => [x(u), y(v)]), cx = x(cost), cy = y(mean);
      const dx = x(1) - x(0), dy = b * (y(1) - y(0)), on = 55 / Math.hypot(dx, dy);
      const back = Math.min(on, (cx - PAD) / dx); // the tangent stops at the axis
      panels[1].innerHTML = svg(width, height, "Mean reward against KL from the reference",
        axes(width, height, "mean reward") + below(width, height, "KL(π ‖ p)")
        + `<path d="M${PAD} ${TOP}L${path.map((q) => q.join(" ")).join("L")}V${TOP}Z" opacity="0.08"/>`
        + text(PAD + 12, TOP + 20, "no law reaches here", "start")
        + [...Array(Math.ceil(far)).keys()].map((v) => text(x(v), height - PAD + 16, v)).join("")
        + r.filter((v) => v >= start).map((v) => text(PAD - 6, y(v) + 4, v, "end")).join("")
        + curve(path, CURVE) + line(cx - back * dx, cy - back * dy, cx + on * dx, cy + on * dy, START) + point([cx, cy]));
      return `E<sub>π*</sub><i>r</i> = ${digits(mean)} &emsp; KL(<i>π*</i> ‖ <i>p</i>) = ${digits(cost)}`
        + ` &emsp; slope of the frontier = <i>β</i> = ${b}`;
    };
  });
})();
