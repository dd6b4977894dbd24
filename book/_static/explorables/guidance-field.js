"use strict";
(() => {
  const { sum, BLUE, ORANGE, scale, text, line, svg, key, control, decades } = bookjs;

  // The plane: p is a mixture of normal laws N(mean, v) of equal shares, and p(c|x) = exp(-|x - centre|^2 / (2 width)). So the
  // tilt of p by p(c|x)^g is again a mixture; g = 0 is p itself and g = 1 the law of the class.
  function powerTilt({ means, v, centre, width }, g) {
    const precision = 1 / v + g / width, gap = (m) => (m[0] - centre[0]) ** 2 + (m[1] - centre[1]) ** 2;
    const moved = means.map((m) => m.map((x, i) => (x / v + (g * centre[i]) / width) / precision));
    return { logs: means.map((m) => (-g * gap(m)) / (2 * (g * v + width))), means: moved, v: 1 / precision };
  }
  function sharesOf(logs) {
    const mass = logs.map((l) => Math.exp(l - Math.max(...logs))), all = sum(mass);
    return mass.map((x) => x / all);
  }
  function noisedScore({ logs, means, v }, s, y) { // gradient of the log density of a mixture with noise of level s
    const V = v + s ** 2, far = (m) => (y[0] - m[0]) ** 2 + (y[1] - m[1]) ** 2;
    const shares = sharesOf(means.map((m, k) => logs[k] - far(m) / (2 * V)));
    return y.map((u, i) => sum(means.map((m, k) => shares[k] * (m[i] - u))) / V);
  }
  // The two pushes on top of the score of p: what guidance adds, and what the tilt by p(c|x)^g asks for.
  function pushes(law, g, s, at) {
    const [p, given, tilted] = [0, 1, g].map((k) => noisedScore(powerTilt(law, k), s, at));
    return [given.map((x, i) => g * (x - p[i])), tilted.map((x, i) => x - p[i])];
  }
  // n points spread like N(0, 1) in the plane, on a spiral.
  const spiral = (n) => Array.from({ length: n }, (_, i) => {
    const far = Math.sqrt(-2 * Math.log(1 - (i + 0.5) / n)), angle = i * Math.PI * (3 - Math.sqrt(5));
    return [far * Math.cos(angle), far * Math.sin(angle)];
  });
  // Heun steps of the ODE dy/ds = -s score(y), from such points with the mean and the spread of a law; the points at each level.
  function odePoints(score, law, levels, n) {
    const shares = sharesOf(law.logs), mean = [0, 1].map((i) => sum(law.means.map((m, k) => shares[k] * m[i])));
    const apart = sum(law.means.map((m, k) => shares[k] * ((m[0] - mean[0]) ** 2 + (m[1] - mean[1]) ** 2))) / 2;
    const wide = Math.sqrt(law.v + apart + levels[0] ** 2);
    const all = [spiral(n).map((z) => z.map((x, i) => mean[i] + wide * x))];
    for (let k = 0; k + 1 < levels.length; k++) {
      const [s, t] = [levels[k], levels[k + 1]];
      all.push(all[k].map((y) => {
        const slope = score(s, y).map((x) => -s * x), guess = y.map((x, i) => x + (t - s) * slope[i]);
        const next = score(t, guess).map((x) => -t * x);
        return y.map((x, i) => x + ((t - s) / 2) * (slope[i] + next[i]));
      }));
    }
    return all;
  }
  function guidedPoints(law, g, levels, n) { // by guidance, and by the exact score of the tilt
    const [p, given, tilted] = [0, 1, g].map((k) => powerTilt(law, k));
    const mix = (s, y) => {
      const a = noisedScore(p, s, y), b = noisedScore(given, s, y);
      return a.map((x, i) => x + g * (b[i] - x));
    };
    return [odePoints(mix, given, levels, n), odePoints((s, y) => noisedScore(tilted, s, y), tilted, levels, n)];
  }
  // The part of the points that is nearest to each mean.
  function nearest(points, means) {
    const at = points.map((y) => means.map((m) => Math.hypot(y[0] - m[0], y[1] - m[1]))).map((d) => d.indexOf(Math.min(...d)));
    return means.map((_, k) => at.filter((j) => j === k).length / points.length);
  }

  bookjs.explorable("guidance-field", (root, { means, v, centre, width: w, g = 3, s = 0.5, n = 150 }) => {
    const law = { means, v, centre, width: w }, levels = decades(-2, 1).reverse();
    const getG = control(root, "g", "scale", [1, 1.5, 2, 2.5, 3, 4, 5, 7, 10], g), getS = control(root, "s", "level", levels, s);
    const dot = (fill) => `<circle cx="13" cy="7" r="4" fill="${fill}"/>`;
    const RING = 'fill="none" stroke="currentColor" stroke-dasharray="2 3"';
    root.querySelector(".bk-key").innerHTML = key(dot(BLUE), "what guidance adds")
      + key(dot(ORANGE), "what the tilt asks for") + key(`<circle cx="13" cy="7" r="6" ${RING}/>`, "modes of <i>p</i>");
    let known = 0, runs; // the runs depend on the scale alone
    return (width, height, panels) => {
      const gNow = getG(), sNow = getS();
      if (gNow !== known) [known, runs] = [gNow, guidedPoints(law, gNow, levels, n)];
      const unit = Math.sqrt(1 + sNow ** 2), far = 2.2, px = (height - 24) / (2 * far); // in units of the spread at this level
      const x = scale(-1, 1, width / 2 - px, width / 2 + px), y = scale(-1, 1, height / 2 + px + 8, height / 2 - px + 8);
      const step = 0.6, wide = Math.min(far * 1.4, width / (2 * px) - 0.2), grid = [];
      for (let a = -Math.floor(wide / step); a <= wide / step; a++)
        for (let b = -3; b <= 3; b++) grid.push([a * step, b * step]);
      const fields = grid.map((z) => pushes(law, gNow, sNow, z.map((u) => u * unit)));
      const most = Math.max(...fields.flat().map((f) => Math.hypot(...f)), 1e-9);
      const arrow = ([a, b], f, color) => {
        const [du, dv] = f.map((u) => (0.9 * step * px * u) / most), size = Math.hypot(du, dv), h = Math.min(4, size / 2);
        const [u, t] = [x(a) + du, y(b) - dv], [ex, ey] = size > 0.5 ? [du / size, -dv / size] : [0, 0];
        const head = `M${u - h * (ex + ey)} ${t - h * (ey - ex)}L${u} ${t}L${u - h * (ex - ey)} ${t - h * (ey + ex)}`;
        return `<path d="M${x(a)} ${y(b)}L${u} ${t}${head}" fill="none" stroke="${color}" stroke-width="1.5"/>`;
      };
      const rings = means.map((m) => `<circle cx="${x(m[0] / unit)}" cy="${y(m[1] / unit)}"
        r="${(px * Math.sqrt(v + sNow ** 2)) / unit}" ${RING}/>`).join("");
      const here = runs.map((run) => run[levels.indexOf(sNow)]);
      [["guided", BLUE], ["tilt", ORANGE]].forEach(([name, color], i) => {
        const dots = here[i].map(([a, b]) => `<circle cx="${x(a / unit)}" cy="${y(b / unit)}" r="2" fill="${color}" opacity="0.7"/>`);
        panels[i].innerHTML = svg(width, height, `Points and pushes, ${name}`, text(2, 11, name, "start") + rings + dots.join("")
          + grid.map((z, k) => arrow(z, fields[k][i], color)).join(""));
      });
      const part = here.map((points) => `${Math.round(100 * nearest(points, means)[0])} %`);
      const size = [0, 1].map((i) => Math.sqrt(sum(fields.map((f) => Math.hypot(...f[i]) ** 2))));
      return `left mode holds ${part[0]} (guided), ${part[1]} (tilt) &emsp; push: ${(size[0] / size[1]).toFixed(2)} times the tilt's`;
    };
  });
  Object.assign(bookjs, { powerTilt, noisedScore, pushes, guidedPoints, nearest });
})();
