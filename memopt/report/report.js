"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const FIRST_ROWS = 20, HOLDERS = 10, BUDGET_HEADROOM = 1.6;
const CURVES = {
  "everything kept": ["--kept", [2, 3]], "stock partition": ["--stock", [7, 4]], plan: ["--plan", []],
  A: ["--stock", [7, 4]], B: ["--plan", []],
};
const ROLES = ["saved", "recomputed", "gradient", "output", "workspace", "temporary"];

// Text only ever enters the document as text nodes, so no name can become markup.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== ""));
  return node;
}
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const byName = new Intl.Collator("en", { numeric: true }).compare;
const sum = (numbers) => numbers.reduce((total, n) => total + n, 0);
const curveStyle = (label) => CURVES[label] || ["--other", [10, 3, 2, 3]];
const roleColour = (role) => `var(--${ROLES.includes(role) ? role : "temporary"})`;
const shortSource = (source) => source.split(/[\\/]/).slice(-2).join("/");
const sourceCode = (source) => el("span", { class: "code muted", title: source }, shortSource(source));

function bytes(n) {
  if (Math.abs(n) < 1024) return `${n} B`;
  const units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
  let value = n / 1024, unit = 0;
  while (Math.abs(value) >= 1023.95 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${value.toFixed(Math.abs(value) < 9.995 ? 2 : 1)} ${units[unit]}`;
}
function seconds(s) {
  if (s === null) return "—";
  if (s === 0) return "0 s";
  const [factor, unit] = s < 999.5e-6 ? [1e6, "µs"] : s < 0.9995 ? [1e3, "ms"] : [1, "s"];
  const value = s * factor;
  return `${value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0)} ${unit}`;
}

function figures(graph) {
  const peak = graph.predicted_peak_bytes, base = graph.baseline_peak_bytes, budget = graph.budget_bytes;
  const cells = [];
  const add = (name, large, small = "") => cells.push(el("div", {}, el("dt", {}, name),
    el("dd", {}, el("span", { class: "large" }, large), el("span", { class: "muted" }, small))));
  const change = base ? (peak / base - 1) * 100 : 0;
  add(graph.certified ? "Peak, certified" : "Peak, modelled", bytes(peak),
    Math.abs(change) < .05 ? "as with everything kept"
      : `${change < 0 ? "−" : "+"}${Math.abs(change).toFixed(1)} % from ${bytes(base)}, everything kept`);
  if (budget === null) add("Budget", "none");
  else if (peak <= budget) add("Budget", bytes(budget), `met, ${bytes(budget - peak)} to spare`);
  else add("Budget", bytes(budget), `exceeded by ${bytes(peak - budget)}`);
  if (graph.held_bytes) add("Held meanwhile", bytes(graph.held_bytes), "by earlier graphs of the step");
  if (graph.training) {
    const share = graph.forward_seconds ? 100 * graph.recompute_seconds / graph.forward_seconds : 0;
    add("Saved for backward", bytes(graph.saved_bytes),
      Object.entries(graph.decisions).map(([kind, n]) => `${n} ${kind}`).join(", "));
    add("Recompute a step", seconds(graph.recompute_seconds), share ? `${share.toFixed(1)} % of the forward` : "");
  }
  const rewrites = Object.entries(graph.rewrites).filter(([, n]) => n);
  add("Rewrites", String(sum(rewrites.map(([, n]) => n))), rewrites.map(([name, n]) => `${name} ${n}`).join(", "));
  add("Planning", seconds(graph.planning_seconds), graph.solver);
  return el("dl", { class: "figures" }, cells);
}

// What was decided: by one plan or, as "keep → recompute", by two.
function decisionSection(graph, title = "Decisions") {
  if (!graph.rows.length) return null;
  // Cells are kind, name, operator, bytes, seconds, source, in this order.
  const columns = [["Decision", 0], ["Value", 1], ["Source", 5], ["Bytes", 3], ["To remake", 4]];
  const state = { column: 3, down: true, text: "", kind: "", limit: FIRST_ROWS };
  const head = el("tr"), body = el("tbody"), foot = el("p", { class: "muted small" });
  const cell = (row) => [
    el("td", {}, row[0].split(" → ").map((kind, i) =>
      [i ? " → " : "", el("span", { class: `kind ${kind}` }, kind)]).flat()),
    el("td", {}, el("code", {}, row[1]), el("div", { class: "muted small" }, row[2]),
      el("div", { class: "narrow" }, sourceCode(row[5]))),
    el("td", { class: "wide" }, sourceCode(row[5])),
    el("td", { class: "number" }, bytes(row[3])),
    el("td", { class: "number" }, seconds(row[4])),
  ];
  function compare(a, b) {
    const [x, y] = [a[state.column] ?? Infinity, b[state.column] ?? Infinity];
    const order = typeof x === "number" ? x - y || 0 : byName(x, y);
    return (state.down ? -order : order) || byName(a[1], b[1]);
  }
  function update() {
    const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = graph.rows.filter((row) => (!state.kind || row[0] === state.kind)
      && words.every((word) => `${row[1]} ${row[2]} ${row[5]}`.toLowerCase().includes(word))).sort(compare);
    head.replaceChildren(...columns.map(([title, column]) => {
      const sorted = column === state.column;
      const side = column === 3 || column === 4 ? "number" : column === 5 ? "wide" : null;
      return el("th", { class: side, "aria-sort": sorted ? (state.down ? "descending" : "ascending") : null },
        el("button", { "data-column": column, onclick() {
          if (sorted) state.down = !state.down;
          else Object.assign(state, { column, down: side === "number" });
          update();
          head.querySelector(`[data-column="${column}"]`).focus();
        } }, title + (sorted ? (state.down ? " ↓" : " ↑") : "")));
    }));
    body.replaceChildren(...rows.slice(0, state.limit).map((row) => el("tr", {}, cell(row))));
    foot.replaceChildren(`${rows.length} of ${graph.rows.length} values, ${bytes(sum(rows.map((row) => row[3])))} `,
      rows.length > state.limit
        ? el("button", { onclick() { state.limit *= 4; update(); } }, "show more") : "");
  }
  const kinds = [...new Set(graph.rows.map((row) => row[0]))].sort();
  const filter = el("div", { class: "row gap" },
    el("input", { type: "search", placeholder: "Filter by name, operator or source", size: "34",
      "aria-label": "Filter decisions", oninput(event) { state.text = event.target.value; update(); } }),
    el("select", { "aria-label": "Kind of decision",
      onchange(event) { state.kind = event.target.value; update(); } },
    el("option", { value: "" }, "all kinds"), kinds.map((kind) => el("option", { value: kind }, kind))));
  update();
  return el("section", {}, el("h2", {}, title), filter,
    el("div", { class: "scroll" }, el("table", { class: "decisions" }, el("thead", {}, head), body)), foot);
}

function remarkSection(graph) {
  if (!graph.remarks.length) return null;
  const groups = new Map(), order = ["applied", "missed", "analysis"];
  for (const remark of graph.remarks) {
    const key = JSON.stringify([remark.kind, remark.pass, remark.text]);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(remark);
  }
  const ranked = [...groups.values()].sort((a, b) => order.indexOf(a[0].kind) - order.indexOf(b[0].kind));
  const where = (remark) => el("span", { class: "code muted", title: remark.source },
    [shortSource(remark.source), remark.node].filter(Boolean).join(" · "));
  const list = el("div");
  function show(limit) {
    list.replaceChildren(...ranked.slice(0, limit).map((said) => el("div", { class: "remark" },
      el("span", { class: `kind ${said[0].kind}` }, said[0].kind), el("code", {}, said[0].pass),
      el("div", {}, said[0].text),
      said.length === 1 ? where(said[0])
        : el("details", {}, el("summary", { class: "muted small" }, `said of ${said.length} nodes`), said.map(where)))),
    ranked.length > limit ? el("button", { onclick() { show(Infinity); } }, `show all ${ranked.length}`) : "");
  }
  show(FIRST_ROWS);
  return el("section", {}, el("h2", {}, "Remarks"), list);
}

function graphSections(graph) {
  return [figures(graph), timelineSection(graph), decisionSection(graph), remarkSection(graph)];
}

// What can be looked at: the graphs of one report or, of two, their pairs and then each report's.
function views(report) {
  const own = (body, letter) => body.graphs.map((graph) => ({
    title: letter ? `${letter}: ${graph.id}` : graph.id, peak: graph.predicted_peak_bytes,
    sections: () => graphSections(graph),
  }));
  return report.beside ? [...pairViews(report.beside, report), ...own(report.beside, "A"), ...own(report, "B")]
    : own(report, "");
}

function headline(report) {
  const count = report.graphs.length, only = report.graphs[0];
  if (report.beside) return "Two plans side by side: changes are from A to B";
  if (!count) return "No graph was compiled.";
  return count === 1 ? `${only.id}, ${only.training ? "training" : "inference"}, lowered by ${only.lowering}`
    : `${count} graphs, predicted peak ${bytes(report.predicted_peak_bytes)}`;
}

function start() {
  const all = views(report), nav = document.getElementById("graphs"), main = document.getElementById("main");
  document.getElementById("headline").textContent = `${headline(report)} · memopt ${report.version}`;
  function show(index) {
    [...nav.children].forEach((button, i) => button.setAttribute("aria-pressed", i === index));
    main.replaceChildren(...all[index].sections().filter(Boolean));
  }
  if (all.length > 1) nav.append(...all.map((view, index) =>
    el("button", { onclick: () => show(index) }, `${view.title} `,
      el("span", { class: "muted" }, view.peak === null ? "" : bytes(view.peak)))));
  // The highest peak is what a report is read for; two are read together.
  if (all.length) show(report.beside ? 0 : all.reduce((best, view, i) => (view.peak > all[best].peak ? i : best), 0));
}
