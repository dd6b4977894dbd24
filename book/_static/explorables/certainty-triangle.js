"use strict";
(() => {
  const { sum, BLUE, ORANGE, GREEN, PAD, TOP, START, CURVE } = bookjs;
  const { scale, text, line, curve, svg, axes, below, point, key, control } = bookjs;
  const SIDE = Math.sqrt(3) / 2; // height of a triangle of side 1
  const INK = 'stroke="currentColor" stroke-width="1.5"';

  const normalised = (logs) => {
    const mass = logs.map((x) => Math.exp(x - Math.max(...logs)));
    return mass.map((m) => m / sum(mass));
  };
  // q_b: the best law for b > 1, the worst for b < 1. At b = 1 there is none.
  const sharpened = (p, b) => normalised(p.map((x) => (b / (b - 1)) * Math.log(x)));
  const entropy = (law) => -sum(law.map((x) => (x > 0 ? x * Math.log(x) : 0)));
  const internal = (law, p, b) => // J_IF of a response of one symbol
    Math.log(p.length) + (b - 1) * entropy(law) + b * sum(law.map((x, k) => x * Math.log(p[k])));
  const corner = (p, y) => p.map((_, k) => (k === y ? 1 : 0));
  const best = (p, b) => { // the best laws; at b = 1 also every mixture of these
    if (b > 1) return [sharpened(p, b)];
    const top = b === 0 ? p.map(() => true) : p.map((x) => x === Math.max(...p));
    return p.map((_, y) => corner(p, y)).filter((_, y) => top[y]);
  };
  // Natural gradient from a start, followed for a time t: log pi = e^((1-b)t) log start + b (e^((1-b)t) - 1)/(1-b) log p.
  function flow(start, p, b, t) {
    const grown = Math.exp((1 - b) * t), pull = b === 1 ? t : (b * Math.expm1((1 - b) * t)) / (1 - b);
    return normalised(start.map((x, k) => grown * Math.log(x) + pull * Math.log(p[k])));
  }
  // Move a law by a step toward the second response (dx) or toward the third (dy); stay where it would leave the inside.
  function moved(law, dx, dy) {
    const next = [law[0] - dx - dy / 2, law[1] + dx - dy / 2, law[2] + dy].map((x) => Math.round(x * 1000) / 1000);
    return Math.min(...next) >= 0.01 ? next : law;
  }

  // The triangle in small ones, each as its three corners.
  const CELLS = [], FINE = 22, grid = (i, j) => [1 - (i + j) / FINE, i / FINE, j / FINE];
  for (let i = 0; i < FINE; i++) {
    for (let j = 0; i + j < FINE; j++) {
      CELLS.push([grid(i, j), grid(i + 1, j), grid(i, j + 1)]);
      if (i + j < FINE - 1) CELLS.push([grid(i + 1, j), grid(i + 1, j + 1), grid(i, j + 1)]);
    }
  }
  const middle = (cell) => [0, 1, 2].map((k) => sum(cell.map((law) => law[k])) / 3);

  // The law nearest to where a pointer is, in whole hundredths, none of them 0.
  function nearest(place) {
    const some = place.map((x) => Math.max(0.01, x)), law = some.map((x) => Math.max(1, Math.round((100 * x) / sum(some))));
    law[law.indexOf(Math.max(...law))] += 100 - sum(law);
    return law.map((x) => x / 100);
  }

  // A point that a pointer drags and the arrow keys move. It lies over the picture, which is drawn anew below it.
  function handle(panel, name, color, law) {
    const place = { law, at: null, from: null }; // the law; where laws lie in the picture, and back
    const spot = document.createElement("span");
    Object.assign(spot, { className: "bk-handle", tabIndex: 0 });
    spot.style.setProperty("--ink", color);
    const said = { role: "slider", "aria-label": name, "aria-valuemin": 0, "aria-valuemax": 100 };
    Object.entries(said).forEach(([k, v]) => spot.setAttribute(k, v));
    const set = (next) => {
      place.law = next;
      spot.dispatchEvent(new Event("input", { bubbles: true }));
    };
    const step = { ArrowLeft: [-0.05, 0], ArrowRight: [0.05, 0], ArrowUp: [0, 0.05], ArrowDown: [0, -0.05] };
    spot.addEventListener("keydown", (e) => {
      if (!step[e.key]) return;
      e.preventDefault();
      set(moved(place.law, ...step[e.key]));
    });
    spot.addEventListener("pointerdown", (e) => spot.setPointerCapture(e.pointerId));
    spot.addEventListener("pointermove", (e) => {
      if (!spot.hasPointerCapture(e.pointerId)) return;
      const box = panel.getBoundingClientRect(), inside = place.from(e.clientX - box.left, e.clientY - box.top);
      set(nearest(inside));
    });
    panel.append(spot);
    place.show = () => {
      const [x, y] = place.at(place.law);
      Object.assign(spot.style, { left: `${x}px`, top: `${y}px` });
      spot.setAttribute("aria-valuenow", Math.round(100 * place.law[0]));
      spot.setAttribute("aria-valuetext", `${name} = ${place.law.join(", ")}`);
    };
    return place;
  }

  bookjs.explorable("certainty-triangle", (root, { p = [0.5, 0.3, 0.2], start = [0.3, 0.3, 0.4], b = 0.5, trained = [] }) => {
    const prices = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3];
    const getB = control(root, "b", "price", prices, b), triangle = root.querySelector(".bk-panels > div");
    triangle.innerHTML = '<div class="bk-picture"></div>';
    const P = handle(triangle, "reference p", GREEN, p), S = handle(triangle, "start", BLUE, start);
    const dot = (x, y) => `<circle cx="${x}" cy="${y}" r="4" fill="${ORANGE}"/>`;
    const diamond = ([x, y], fill, k = 8) =>
      `<path d="M${x} ${y - k}l${k} ${k}l-${k} ${k}l-${k} -${k}Z" fill="${fill}" ${INK}/>`;
    const disc = (color) => `<circle cx="13" cy="7" r="6" fill="${color}" ${INK}/>`;
    root.querySelector(".bk-key").innerHTML = key(disc(GREEN), "<i>p</i>, the reference: drag it")
      + key(disc(BLUE), "a start: drag it") + key(diamond([13, 7], ORANGE), "the best law") + key(diamond([13, 7], "none"), "the worst")
      + key(line(0, 7, 26, 7, START), "dashed: borders between the corners (left), <i>b</i> = 1 (right)")
      + (trained.length ? key(dot(13, 7), "trained from <i>p</i>") : "");
    return (width, height, panels) => {
      const B = getB(), side = Math.min(width - 60, (height - 46) / SIDE), left = (width - side) / 2, floor = height - 26;
      const at = (law) => [left + side * (law[1] + law[2] / 2), floor - side * SIDE * law[2]];
      const from = (x, y) => {
        const third = (floor - y) / (side * SIDE), second = (x - left) / side - third / 2;
        return [1 - second - third, second, third];
      };
      for (const place of [P, S]) Object.assign(place, { at, from }).show();
      const ref = P.law, tops = best(ref, B), q = B === 1 ? null : sharpened(ref, B);

      // The objective, from the worst law (paper) to the best (ink).
      const values = CELLS.map((c) => internal(middle(c), ref, B)), shade = scale(Math.min(...values), Math.max(...values) + 1e-12, 0, 0.5);
      const tile = (c, i) => `<path d="M${c.map((law) => at(law).map((x) => x.toFixed(1)).join(" ")).join("L")}Z" fill="${ORANGE}"
        opacity="${shade(values[i]).toFixed(3)}" shape-rendering="crispEdges"/>`;
      const slow = 1 / Math.max(0.1, Math.abs(1 - B)); // near the border all takes longer
      const path = Array.from({ length: 161 }, (_, i) => flow(S.law, ref, B, 40 * (i / 160) ** 3 * slow));
      // Below b = 1 three borders through the worst law part the starts by the corner where they end.
      const opposite = (y) => q.map((v, k) => (k === y ? 0 : v / (1 - q[y])));
      const borders = B < 1 ? [0, 1, 2].map((y) => line(...at(q), ...at(opposite(y)), START)).join("") : "";
      const edge = [0, 1, 2, 0].map((y) => at(corner(ref, y)));
      root.querySelector(".bk-picture").innerHTML = svg(width, height, "Laws of three responses, as points of a triangle",
        CELLS.map(tile).join("") + borders + curve(edge, 'stroke="currentColor"') + curve(path.map(at), CURVE)
        + (B < 1 ? diamond(at(q), "none", 13) : "") + tops.map((law) => diamond(at(law), ORANGE)).join("")
        + [0, 1, 2].map((y) => text(edge[y][0], y === 2 ? edge[y][1] - 10 : floor + 22, `y${"₁₂₃"[y]}`)).join(""));

      const runs = ref.every((v, k) => v === p[k]) ? trained : []; // they belong to the first reference
      const x = scale(0, 3, PAD, width - 12), y = scale(0, Math.log(3), height - PAD, TOP + 4);
      const above = Array.from({ length: 100 }, (_, i) => 1.001 + (i / 99) ** 2 * 1.999);
      panels[1].innerHTML = svg(width, height, "Entropy of the best law against b",
        axes(width, height, "entropy of the best law") + below(width, height, "b")
        + [0, 1, 2, 3].map((v) => text(x(v), height - PAD + 16, v)).join("")
        + text(PAD + 6, y(0) - 6, "0", "start") + text(PAD + 6, y(Math.log(2)) - 4, "log 2", "start")
        + line(PAD, y(Math.log(2)), width - 4, y(Math.log(2)), 'stroke="currentColor" opacity="0.4"')
        + line(x(1), TOP, x(1), height - PAD, START)
        + curve([[x(0), y(0)], [x(1), y(0)]], CURVE) + curve(above.map((v) => [x(v), y(entropy(sharpened(ref, v)))]), CURVE)
        + runs.map(([v, h]) => dot(x(v), y(h))).join("") + point([x(B), y(entropy(tops[0]))]));

      const say = (law) => `(${law.map((v) => +v.toFixed(3)).join(", ")})`, end = flow(S.law, ref, B, 400 * slow);
      const names = tops.map((law) => `<i>y</i><sub>${law.indexOf(1) + 1}</sub>`).join(", or always ");
      const top = B > 1 ? say(tops[0]) : `always ${names}${B === 1 && tops[1] ? ", or any mixture" : ""}`;
      return `<i>b</i> = ${B}, <i>p</i> = ${say(ref)} &emsp; best: ${top} &emsp; from ${say(S.law)} natural gradient ends at ${say(end)}`;
    };
  });
  Object.assign(bookjs, { sharpened, entropy, internal, best, flow, moved });
})();
