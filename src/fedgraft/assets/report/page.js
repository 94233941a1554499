"use strict";
// Tables sort by the buttons that their headings become; without scripts they are tables as they are.
for (const table of document.querySelectorAll("table[data-sorts]")) {
  const body = table.tBodies[0], headings = [...table.tHead.rows[0].cells], given = [...body.rows];
  const number = text => /^[+-]?\.?\d/.test(text = text.replace(/^< /, "")) ? parseFloat(text.replaceAll(",", "")) : NaN;
  const ways = {
    none: () => given,
    ascending: at => sorted(at, 1),
    descending: at => sorted(at, -1),
  };
  function sorted(at, sign) {
    const text = row => row.cells[at].textContent.trim(), missing = row => ["", "–", "nan"].includes(text(row));
    const numeric = given.some(row => !missing(row)) && given.every(row => missing(row) || !Number.isNaN(number(text(row))));
    const order = numeric
      ? (a, b) => number(text(a)) - number(text(b))
      : (a, b) => text(a).localeCompare(text(b), undefined, { numeric: true });
    return [...given].sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : sign * order(a, b)));  // nothing measured comes last
  }
  headings.forEach((heading, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const way = { none: "ascending", ascending: "descending", descending: "none" }[heading.getAttribute("aria-sort")];
      headings.forEach(other => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", way);
      body.append(...ways[way](at));
    });
  });
}
// An entry of a legend brings out its series: while it is pointed at, and after it was pressed until it is pressed again.
for (const figure of document.querySelectorAll("figure:has(.legend)")) {
  const series = [...figure.querySelectorAll("[data-series]")], buttons = [];
  if (!series.length) continue;
  let pressed = -1;
  const show = at => {
    figure.classList.toggle("chosen", at >= 0);
    series.forEach(part => part.toggleAttribute("data-shown", Number(part.dataset.series) === at));
  };
  figure.querySelectorAll(".legend > li").forEach((entry, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.append(...entry.childNodes);
    entry.append(button);
    buttons.push(button);
    button.addEventListener("pointerenter", () => show(at));
    button.addEventListener("pointerleave", () => show(pressed));
    button.addEventListener("click", () => {
      pressed = pressed === at ? -1 : at;
      buttons.forEach((other, number) => other.setAttribute("aria-pressed", String(number === pressed)));
      show(pressed);
    });
  });
}
