"use strict";
// What all explorables share: sliders, and a picture that follows them. Computed in the page: no library, no network.
// A page says <div class="bk-explorable" data-name="tilt" data-options='{...}'>, see tiltlib.figures.explorable, and loads
// explorables/tilt.js, which calls bookjs.explorable("tilt", make). make(root, options) puts sliders with `control`,
// a choice among names with `choice`, and returns draw(width, height, panels), which fills the panels and returns what is
// said below them.
Object.assign(bookjs, (() => {
  // A slider over a list of values; returns a function that tells the chosen one.
  function control(root, symbol, name, values, value) {
    const off = values.map((v) => Math.abs(Math.log(v / value))), nearest = off.indexOf(Math.min(...off));
    const row = document.createElement("label");
    row.innerHTML = `<span>${name} <i>${symbol}</i></span><input type="range" min="0" max="${values.length - 1}" step="1"
      value="${nearest}" autocomplete="off"><span class="bk-value"></span>`;
    root.querySelector(".bk-controls").append(row);
    const input = row.querySelector("input"), now = () => values[input.value];
    const say = () => {
      row.querySelector(".bk-value").textContent = `${now()}`;
      input.setAttribute("aria-valuetext", `${symbol} = ${now()}`);
    };
    input.addEventListener("input", say);
    say();
    return now;
  }
  // One of a few names; returns a function that tells the chosen one. The arrow keys go from one to the next.
  function choice(root, name, values, value) {
    const row = document.createElement("div"), group = `${root.dataset.name} ${name}`;
    row.className = "bk-choice";
    row.setAttribute("role", "radiogroup");
    row.setAttribute("aria-label", name);
    row.innerHTML = `<span>${name}</span>` + values.map((v) => `<label><input type="radio" name="${group}" value="${v}"
      ${v === value ? "checked" : ""} autocomplete="off">${v}</label>`).join("");
    root.querySelector(".bk-controls").append(row);
    return () => row.querySelector(":checked").value;
  }
  // 1, 1.3, 1.6, 2, ... : ten values a decade, two digits each.
  const decades = (from, to) => {
    const all = Array.from({ length: (to - from) * 10 + 1 }, (_, i) => 10 ** (from + i / 10));
    return all.map((v) => +v.toPrecision(2));
  };

  function start(root, make) {
    root.innerHTML = '<div class="bk-panels"><div></div><div></div></div><p class="bk-key"></p>'
      + '<div class="bk-controls"></div><output></output>';
    const draw = make(root, JSON.parse(root.dataset.options || "{}")), panels = root.querySelectorAll(".bk-panels > div");
    const update = () => {
      root.querySelector("output").innerHTML = draw(Math.max(240, panels[0].clientWidth), 250, panels);
    };
    root.addEventListener("input", update);
    // Follows the box, not the window: on a window event the box may still have its old width.
    new ResizeObserver(update).observe(root.querySelector(".bk-panels"));
  }

  function explorable(name, make) { // where no script runs, the words inside stay
    document.addEventListener("DOMContentLoaded", () =>
      document.querySelectorAll(`.bk-explorable[data-name="${name}"]`).forEach((root) => start(root, make)));
  }
  return { control, choice, decades, explorable };
})());
