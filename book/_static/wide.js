"use strict";
// Formulas, tables and code that are wider than the column can be scrolled. A dotted edge says so; phones show no scrollbar.
document.addEventListener("DOMContentLoaded", () => {
  const boxes = document.querySelectorAll("div.math, .bk-table, .pst-scrollable-table-container, div.highlight pre");
  const mark = (box) => box.classList.toggle("bk-wider", box.scrollWidth > box.offsetWidth + 2);
  const seen = new ResizeObserver((entries) => entries.forEach((entry) => mark(entry.target)));
  boxes.forEach((box) => seen.observe(box));
  window.MathJax?.startup?.promise?.then(() => boxes.forEach(mark));
});
