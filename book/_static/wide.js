"use strict";
// Formulas, tables and code that are wider than the column can be scrolled. A dotted edge says so; phones show no scrollbar.
document.addEventListener("DOMContentLoaded", () => {
  const mark = (box) => box.classList.toggle("bk-wider", box.scrollWidth > box.offsetWidth + 2);
  const seen = new ResizeObserver((entries) => entries.forEach((entry) => mark(entry.target)));
  const watch = (boxes) => document.querySelectorAll(boxes).forEach((box) => seen.observe(box));
  watch(".bk-table, .pst-scrollable-table-container, div.highlight pre");
  // A formula is there once it is typeset, and what scrolls is the box that MathJax makes.
  window.MathJax?.startup?.promise?.then(() => watch("div.math > mjx-container"));
});
