"use strict";
// Tables sort by the buttons that their headings become; without scripts they are tables as they are.
for (const table of document.querySelectorAll("table[data-sorts]")) {
  const body = table.tBodies[0], headings = [...table.tHead.rows[0].cells], given = [...body.rows];
  const number = text => /^[+-]?[\d,]*\.?\d/.test(text) ? parseFloat(text.replaceAll(",", "")) : NaN;
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
