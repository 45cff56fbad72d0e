// Two plans side by side: their figures in a table, their curves in one chart, and what each holds
// where the cursor is; then the values that they decide differently about.

function pairViews(a, b) {
  const count = Math.min(a.graphs.length, b.graphs.length);
  return a.graphs.slice(0, count).map((graph, i) => ({
    title: count === 1 ? "A beside B" : `A beside B: ${graph.id}`, peak: null,
    sections: () => pairSections(a, b, graph, b.graphs[i]),
  }));
}

function pairSections(a, b, first, second) {
  const plan = (graph, label) => {
    const own = graph.timelines[graph.timelines.length - 1];
    return own ? [{ ...own, label }] : [];
  };
  const [x, y] = [first.budget_bytes, second.budget_bytes];
  const budgets = x === y ? [[x, "budget"]] : [[x, "budget of A"], [y, "budget of B"]];
  const curves = { timelines: [...plan(first, "A"), ...plan(second, "B")] };
  return [
    besideTable(a, b, first, second), timelineSection(curves, { budgets, each: true }),
    decisionSection({ rows: changedRows(first.rows, second.rows) }, "Decided otherwise"),
  ];
}

// Rows as decisions have them; a value that only one of the plans knows has no fate in the other.
function changedRows(first, second) {
  const before = new Map(first.map((row) => [row[1], row])), now = new Map(second.map((row) => [row[1], row]));
  return [...new Set([...before.keys(), ...now.keys()])].map((name) => {
    const [old, own] = [before.get(name), now.get(name)];
    return [`${old ? old[0] : "none"} → ${own ? own[0] : "none"}`, ...(own || old).slice(1)];
  }).filter(([fates]) => fates.split(" → ")[0] !== fates.split(" → ")[1]);
}

function besideTable(a, b, first, second) {
  const training = first.training || second.training;
  const decided = (graph) => Object.entries(graph.decisions).map(([kind, n]) => `${n} ${kind}`).join(", ") || "none";
  // Name, what to read, how to write it; of all of these less is better.
  const rows = [
    ["Peak", (g) => g.predicted_peak_bytes, bytes],
    ["Everything kept", (g) => g.baseline_peak_bytes, bytes],
    ...(training ? [
      ["Saved for backward", (g) => g.saved_bytes, bytes],
      ["Recompute a step", (g) => g.recompute_seconds, seconds],
    ] : []),
    ["Step, modelled", (g) => g.step_seconds || null, seconds],
    ["On the host", (g) => g.host_bytes + g.file_bytes, bytes],
    ["Planning", (g) => g.planning_seconds, seconds],
  ].filter(([, read]) => read(first) || read(second));
  const change = (x, y) => {
    if (!x || y === null) return el("span", { class: "muted" }, "—");
    const percent = (y / x - 1) * 100;
    if (Math.abs(percent) < .05) return el("span", { class: "muted" }, "same");
    const text = `${percent < 0 ? "−" : "+"}${Math.abs(percent).toFixed(1)} %`;
    return el("span", { class: percent < 0 ? "better" : "worse" }, text);
  };
  const head = (letter, body) => el("th", {},
    el("i", { class: "dot", style: { background: `var(${CURVES[letter][0]})` } }),
    el("span", { class: "letter" }, letter), body.name || "");
  const budget = (g) => (g.budget_bytes === null ? g.budget : bytes(g.budget_bytes));
  const plain = (name, read) => el("tr", {}, el("td", { class: "muted" }, name), el("td", {}, read(first)),
    el("td", {}, read(second)), el("td", {}));
  return el("div", { class: "scroll", style: { marginTop: "20px" } }, el("table", { class: "beside" },
    el("thead", {}, el("tr", {}, el("th", {}), head("A", a), head("B", b), el("th", {}, "A to B"))),
    el("tbody", {}, plain("Budget", budget), rows.map(([name, read, write]) => el("tr", {},
      el("td", { class: "muted" }, name), el("td", { class: "large" }, write(read(first))),
      el("td", { class: "large" }, write(read(second))), el("td", {}, change(read(first), read(second))))),
    plain("Decisions", decided), plain("Solver", (g) => g.solver))));
}
