"use strict";
(() => {
  const { sum, totalVariation, PAD, TOP, START, CURVE, SOFT, NOISE, DASH, control, decades } = bookjs;
  const { scale, text, power, curve, svg, axes, below, point, line, key, bar, digits } = bookjs;

  // All strings of a chain of two symbols and their probabilities: `first` is that of a first `0`, stay = [p(0|0), p(1|1)].
  const names = (length) => Array.from({ length: 2 ** length }, (_, i) =>
    Array.from({ length }, (_, t) => "01"[(i >> (length - 1 - t)) & 1]).join(""));
  const chance = (name, first, stay) => [...name].reduce((so_far, symbol, t) => {
    const before = name[t - 1], again = stay["01".indexOf(before)];
    const p = t === 0 ? (symbol === "0" ? first : 1 - first) : symbol === before ? again : 1 - again;
    return so_far * p;
  }, 1);
  const stringLaw = (length, first, stay) => names(length).map((name) => chance(name, first, stay));
  const normalised = (mass) => mass.map((m) => m / sum(mass));

  // p^a over strings, and token temperature 1/a, which sharpens every conditional by itself.
  const powerLaw = (length, first, stay, a) => normalised(stringLaw(length, first, stay).map((p) => p ** a));
  const tokenLaw = (length, first, stay, a) => {
    const sharp = (u) => normalised([u ** a, (1 - u) ** a])[0];
    return stringLaw(length, sharp(first), stay.map(sharp));
  };

  bookjs.explorable("power-and-temperature", (root, { length = 2, first = 0.6, stay = [0.5, 0.9], a = 4 }) => {
    const exponents = [...new Set([0.25, 0.32, 0.4, 0.5, 0.63, 0.8, ...decades(0, 1).filter((x) => x < 8), 8, 12, 16, 32, 50])];
    const shares = Array.from({ length: 19 }, (_, i) => +(0.05 * (i + 1)).toFixed(2));
    const getA = control(root, "a", "power", exponents, a);
    const getX = control(root, "p(0|0)", "", shares, stay[0]);
    const getZ = control(root, "p(1|1)", "", shares, stay[1]);
    root.querySelector(".bk-key").innerHTML = key(bar(SOFT), "power law <i>p<sup>a</sup></i>")
      + key(bar(NOISE), "token temperature 1/<i>a</i>") + key(DASH, "<i>p</i>, the reference");
    const strings = names(length);

    return (width, height, panels) => {
      const now = getA(), chain = [length, first, [getX(), getZ()]], p = stringLaw(...chain);
      const laws = [powerLaw(...chain, now), tokenLaw(...chain, now)];
      const y = scale(0, 1, height - PAD, TOP), step = (width - PAD - 4) / strings.length;
      const group = (name, k) => {
        const x = PAD + step * (k + 0.5), column = (law, i) => `<rect x="${x + step * 0.33 * (i - 1)}" y="${y(law[k])}"
          width="${step * 0.3}" height="${y(0) - y(law[k])}" ${[SOFT, NOISE][i]}/>`;
        return laws.map(column).join("") + line(x - step * 0.42, y(p[k]), x + step * 0.42, y(p[k]), START)
          + text(x, height - PAD + 16, name);
      };
      panels[0].innerHTML = svg(width, height, "Probability of each string", axes(width, height, "probability")
        + below(width, height, "string") + [0, 0.5, 1].map((v) => text(PAD - 6, y(v) + 4, v, "end")).join("")
        + strings.map(group).join(""));

      const far = (b) => totalVariation(powerLaw(...chain, b), tokenLaw(...chain, b));
      const along = Array.from({ length: 121 }, (_, i) => 0.25 * 200 ** (i / 120)); // powers from 1/4 to 50
      const at = scale(Math.log(0.25), Math.log(50), PAD, width - 16);
      panels[1].innerHTML = svg(width, height, "Total variation of the two laws against the power",
        axes(width, height, "TV between the two") + below(width, height, "power a")
        + [[0.25, "¼"], [1, 1], [4, 4], [16, 16], [50, 50]].map(([v, s]) => text(at(Math.log(v)), height - PAD + 16, s)).join("")
        + [0, 0.5, 1].map((v) => text(PAD - 6, y(v) + 4, v, "end")).join("")
        + curve(along.map((b) => [at(Math.log(b)), y(far(b))]), CURVE) + point([at(Math.log(now)), y(far(now))]));
      const begin = (law) => digits(sum(law.filter((_, k) => strings[k][0] === "1")));
      return `<i>a</i> = ${now}: TV = ${digits(far(now))} &emsp; first symbol 1: power law ${begin(laws[0])}, `
        + `token temperature ${begin(laws[1])}, <i>p</i> ${begin(p)}`;
    };
  });
  Object.assign(bookjs, { powerLaw, tokenLaw });
})();
