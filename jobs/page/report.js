"use strict";
// The page's own script: draws the figures in the colours of the theme, and sorts tables.
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)"), print = matchMedia("print"), narrow = matchMedia("(max-width: 48rem)");

function themed(layout, sankey) {
  const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--grid"), zerolinecolor: colour("--line"), linecolor: colour("--line"),
                 automargin: true, title: { font: { size: 12 } }, tickfont: { size: 11 } };
  const template = { layout: {
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--ink") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
    margin: { l: sankey ? 8 : 48, r: 12, t: layout.updatemenus?.length ? 44 : 22, b: sankey ? 16 : 40 },
    legend: { orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom", traceorder: "normal", font: { size: 11 } },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
  } };
  const menus = (layout.updatemenus || []).map((menu) => ({ ...menu, bgcolor: colour("--card"),
    bordercolor: colour("--line"), font: { size: 11, color: colour("--ink") } }));
  const words = (layout.annotations || []).map((word) => (narrow.matches ? { ...word, textangle: -30 } : word));
  if (narrow.matches && words.length) template.layout.margin.t = 58;  // stages' names stand aslant where they are close
  return { ...layout, template, updatemenus: menus, annotations: words, autosize: true };
}

async function draw() {
  for (const [id, figure] of Object.entries(figures)) {
    const small = narrow.matches && figure.data[0].type === "sankey";
    const data = small ? figure.data.map((t) => ({ ...t, textfont: { size: 9 }, node: { ...t.node, pad: 8, thickness: 7 } }))
                       : figure.data;
    await Plotly.react(id, data, themed(figure.layout, figure.data[0].type === "sankey"), { responsive: true, displayModeBar: false });
  }
  document.body.dataset.drawn = Object.keys(figures).length;
}
dark.addEventListener("change", draw);
print.addEventListener("change", draw);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
narrow.addEventListener("change", draw);
draw();

function sort(button) {
  const heading = button.parentElement, row = heading.parentElement, body = row.closest("table").tBodies[0];
  const column = [...row.cells].indexOf(heading), number = heading.classList.contains("n");
  const now = heading.getAttribute("aria-sort");
  const up = now ? now === "descending" : !number;  // numbers: the largest first
  for (const cell of row.cells) cell.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (r) => number ? r.cells[column].dataset.v : r.cells[column].textContent;
  const compare = (a, b) => {
    const x = key(a), y = key(b);
    if (x === "" || y === "") return (x === "") - (y === "");  // empty cells stay last
    return (number ? x - y : x.localeCompare(y, "en", { numeric: true })) * (up ? 1 : -1);
  };
  body.append(...[...body.rows].sort(compare));
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("th button");
  if (button) sort(button);
});
