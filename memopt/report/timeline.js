// Live bytes over the step, and who holds them where the cursor is.

// A timeline with what the chart reads many times over: live bytes, and where backward begins.
function prepare(raw) {
  const delta = new Float64Array(raw.steps.length + 1);
  for (const [, nbytes, first, last] of raw.ranges) { delta[first] += nbytes; delta[last + 1] -= nbytes; }
  const live = delta.slice(0, -1);
  for (let i = 1; i < live.length; i++) live[i] += live[i - 1];
  const turn = raw.steps.findIndex((step) => step[2]);
  return { ...raw, live, end: live.length, turn: turn < 0 ? live.length : turn, shown: true };
}

// Steps are placed on the plan's own axis; the halves of other schedules are stretched to its halves.
function axisOf(reference) {
  const share = reference.end ? reference.turn / reference.end : 1;
  return {
    share,
    at(t, i) {
      if (t.turn === t.end) return i / t.end;
      return i <= t.turn && t.turn ? share * i / t.turn
        : share + (1 - share) * (i - t.turn) / (t.end - t.turn);
    },
    step(t, x) {
      const i = t.turn === t.end ? x * t.end
        : x < share ? x / share * t.turn
        : t.turn + (x - share) / ((1 - share) || 1) * (t.end - t.turn);
      return Math.max(0, Math.min(t.end - 1, Math.floor(i + 1e-9)));
    },
  };
}

// Curves with a legend, and what is alive where the cursor is: at one curve, or at each of them.
function timelineSection(graph, { budgets = [[graph.budget_bytes, "budget"]], each = false } = {}) {
  const timelines = graph.timelines.filter((t) => t.steps.length).map(prepare);
  if (!timelines.length) return null;
  const reference = timelines[timelines.length - 1], axis = axisOf(reference);
  const start = { t: reference, step: reference.peak_step };
  let pinned = start, cursor = start, frame = 0, box = null;

  const curves = el("canvas"), marks = el("canvas");
  const chart = el("div", {
    class: "chart", tabindex: "0", role: "img",
    "aria-label": "Live bytes over the step. Left and right arrows move from step to step; "
      + "up and down change the curve.",
  }, curves, marks);
  const panels = el("div", { class: "panels" });
  const legend = el("div", { class: "row" }, timelines.map((t) => {
    const button = el("button", { class: "curve", "aria-pressed": "true", onclick() {
      t.shown = !t.shown;
      button.setAttribute("aria-pressed", t.shown);
      draw();
    } }, el("i", { class: "swatch", style: {
      borderColor: `var(${curveStyle(t.label)[0]})`,
      borderTopStyle: { 0: "solid", 2: t.label === "everything kept" ? "dotted" : "dashed" }[
        curveStyle(t.label)[1].length] || "dashed",
    } }), `${t.label} `, el("span", { class: "muted" }, `peak ${bytes(t.peak_bytes)}`));
    return button;
  }));

  function context(canvas) {
    const ratio = window.devicePixelRatio || 1, { width, height } = chart.getBoundingClientRect();
    canvas.width = width * ratio; canvas.height = height * ratio;
    const ctx = canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    ctx.font = "12px system-ui, sans-serif";
    return [ctx, width, height];
  }

  function draw() {
    const [ctx, width, height] = context(curves);
    const shown = timelines.filter((t) => t.shown), highest = Math.max(1, ...shown.map((t) => t.peak_bytes));
    const bounds = budgets.filter(([n]) => n !== null);
    const drawn = bounds.map(([n]) => n).filter((n) => n <= highest * BUDGET_HEADROOM);
    const top = Math.max(highest, ...drawn) * 1.12;
    const power = Math.max(0, Math.floor(Math.log(top / 2) / Math.log(1024)));
    const unit = 1024 ** power, name = ["B", "KiB", "MiB", "GiB", "TiB"][power];
    box = { left: 52, right: width - 10, top: 24, bottom: height - 34 };
    box.x = (share) => box.left + share * (box.right - box.left);
    box.y = (n) => box.bottom - n / top * (box.bottom - box.top);

    const rough = top / unit / 6, ten = 10 ** Math.floor(Math.log10(rough));
    const tick = ten * [1, 2, 2.5, 5, 10].find((m) => m * ten >= rough);
    ctx.lineWidth = 1;
    ctx.textBaseline = "middle"; ctx.textAlign = "right";
    for (let value = 0; value * unit <= top; value += tick) {
      const y = Math.round(box.y(value * unit)) + .5;
      ctx.strokeStyle = css("--line"); ctx.fillStyle = css("--muted");
      ctx.beginPath(); ctx.moveTo(box.left, y); ctx.lineTo(box.right, y); ctx.stroke();
      ctx.fillText(String(+value.toFixed(6)), box.left - 8, y);
    }
    ctx.textAlign = "left";
    ctx.fillText(name, 8, 10);
    ctx.textAlign = "center";
    const halves = [["forward", 0, axis.share], ["backward", axis.share, 1]];
    if (axis.share < 1) for (const [half, from, to] of halves) {
      if (to > from) ctx.fillText(half, box.x((from + to) / 2), 10);
    }
    ctx.fillText(`step of ${each ? "" : "the "}${reference.label}`, box.x(.5), height - 8);
    ctx.textAlign = "left"; ctx.fillText("0", box.left, box.bottom + 12);
    ctx.textAlign = "right"; ctx.fillText(String(reference.end), box.right, box.bottom + 12);
    if (axis.share > 0 && axis.share < 1) {
      ctx.textAlign = "center";
      if (axis.share > .08 && axis.share < .92) ctx.fillText(String(reference.turn), box.x(axis.share), box.bottom + 12);
      ctx.strokeStyle = css("--muted"); ctx.setLineDash([1, 3]);
      ctx.beginPath(); ctx.moveTo(box.x(axis.share), 4); ctx.lineTo(box.x(axis.share), box.bottom); ctx.stroke();
      ctx.setLineDash([]);
    }

    ctx.lineJoin = "round"; ctx.lineWidth = 1.8;
    for (const t of shown) {
      const [colour, dashes] = curveStyle(t.label);
      const path = new Path2D();
      for (let i = 0; i < t.end; i++) {
        const y = box.y(t.live[i]);
        if (i) path.lineTo(box.x(axis.at(t, i)), y); else path.moveTo(box.left, y);
        path.lineTo(box.x(axis.at(t, i + 1)), y);
      }
      if (t === reference) {
        const area = new Path2D(path);
        area.lineTo(box.x(axis.at(t, t.end)), box.bottom); area.lineTo(box.left, box.bottom);
        ctx.globalAlpha = .13; ctx.fillStyle = css(colour); ctx.fill(area); ctx.globalAlpha = 1;
      }
      ctx.strokeStyle = css(colour); ctx.setLineDash(dashes); ctx.stroke(path); ctx.setLineDash([]);
      dot(ctx, t, t.peak_step, 3.5);
    }
    let above = 0, wide = 0;
    for (const [budget, name] of bounds) {
      ctx.fillStyle = ctx.strokeStyle = css("--text"); ctx.lineWidth = 1.2; ctx.textAlign = "left";
      if (drawn.includes(budget)) {
        const y = Math.round(box.y(budget)) + .5;
        ctx.setLineDash([7, 4]); ctx.beginPath(); ctx.moveTo(box.left, y); ctx.lineTo(box.right, y);
        ctx.stroke(); ctx.setLineDash([]);
        label(ctx, `${name} ${bytes(budget)}`, box.left + 6, y - 9);
        wide = Math.max(wide, ctx.measureText(`${name} ${bytes(budget)}`).width + 14);
      } else label(ctx, `${name} ${bytes(budget)}, above the chart`, box.left + 6, box.top + 6 + 16 * above++);
    }
    if (reference.shown) {
      const x = box.x(axis.at(reference, reference.peak_step + .5)), y = box.y(reference.peak_bytes);
      const text = `${each ? `${reference.label}, ` : ""}peak ${bytes(reference.peak_bytes)}`;
      const width = ctx.measureText(text).width, left = x + width + 8 < box.right;
      ctx.fillStyle = css(curveStyle(reference.label)[0]); ctx.textAlign = left ? "left" : "right";
      const near = drawn.map(box.y).filter((line) => Math.abs(line - (y - 10)) < 16);
      const covers = near.length && (left ? x : x - width) < box.left + wide;
      label(ctx, text, left ? x + 6 : x - 6, Math.min(y, ...near) - (covers ? 24 : 10));
    }
    mark();
  }

  function label(ctx, text, x, y) {
    ctx.save();
    ctx.lineJoin = "round"; ctx.lineWidth = 4; ctx.strokeStyle = css("--page");
    ctx.strokeText(text, x, y); ctx.fillText(text, x, y);
    ctx.restore();
  }
  function dot(ctx, t, step, radius) {
    ctx.beginPath();
    ctx.arc(box.x(axis.at(t, step + .5)), box.y(t.live[step]), radius, 0, 7);
    ctx.fillStyle = css(curveStyle(t.label)[0]); ctx.fill();
  }

  function mark() {
    const [ctx] = context(marks), x = box.x(axis.at(cursor.t, cursor.step + .5));
    ctx.strokeStyle = css("--muted"); ctx.lineWidth = 1;
    ctx.beginPath(); ctx.moveTo(x, box.top); ctx.lineTo(x, box.bottom); ctx.stroke();
    const share = axis.at(cursor.t, cursor.step + .5);
    const read = each ? timelines.map((t) => ({ t, step: t === cursor.t ? cursor.step : axis.step(t, share) })) : [cursor];
    for (const { t, step } of read) if (t.shown || !each) dot(ctx, t, step, 5);
    panels.replaceChildren(...read.map((at) => el("section", {
      class: "inspect", "aria-label": `The step under the cursor, ${at.t.label}`,
    }, describe(at, each ? [] : timelines, axis))));
  }

  // The curve nearest to the pointer is the one that is read.
  function pointed(event) {
    const shown = timelines.filter((t) => t.shown), { left, top } = chart.getBoundingClientRect();
    if (!shown.length) return cursor;
    const x = Math.max(0, Math.min(1, (event.clientX - left - box.left) / (box.right - box.left)));
    const away = (t) => Math.abs(box.y(t.live[axis.step(t, x)]) - (event.clientY - top));
    const t = shown.reduce((best, other) => (away(other) <= away(best) ? other : best));
    return { t, step: axis.step(t, x) };
  }
  function move(to) {
    cursor = to;
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(mark);
  }
  chart.addEventListener("pointermove", (event) => move(pointed(event)));
  chart.addEventListener("pointerdown", (event) => { pinned = pointed(event); move(pinned); });
  chart.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "mouse") pinned = cursor;
    move(pinned);
  });
  chart.addEventListener("keydown", (event) => {
    const along = { ArrowLeft: -1, ArrowRight: 1, PageUp: -25, PageDown: 25 }[event.key];
    const across = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!along && !across) return;
    event.preventDefault();
    let { t, step } = cursor;
    if (along) step = Math.max(0, Math.min(t.end - 1, step + along));
    else {
      const shown = timelines.filter((one) => one.shown || one === t);
      const share = axis.at(t, step + .5);
      t = shown[(shown.indexOf(t) + across + shown.length) % shown.length];
      step = axis.step(t, share);
    }
    pinned = { t, step };
    move(pinned);
  });
  new ResizeObserver(draw).observe(chart);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  return el("section", {}, el("h2", {}, "Live bytes over the step"), legend, chart, panels);
}

function describe({ t, step }, timelines, axis) {
  const [name, source, backward] = t.steps[step], live = t.live[step];
  const alive = t.ranges.filter((r) => r[1] && r[2] <= step && step <= r[3])
    .sort((a, b) => b[1] - a[1] || byName(a[0], b[0]));
  const others = timelines.filter((o) => o !== t && o.shown)
    .map((o) => `${o.label} ${bytes(o.live[axis.step(o, axis.at(t, step + .5))])}`);
  const byRole = new Map();
  for (const r of alive) byRole.set(r[5], (byRole.get(r[5]) || 0) + r[1]);
  const roles = [...byRole].sort((a, b) => b[1] - a[1]);
  const rest = alive.slice(HOLDERS), half = backward ? "backward" : "forward";
  return [
    el("h3", {}, `${bytes(live)} live`, step === t.peak_step ? ", the peak" : "",
      el("span", { class: "muted" }, ` · ${t.label}, ${half}, step ${step} of ${t.end}`)),
    el("p", {}, el("code", {}, name), " ", sourceCode(source)),
    timelines.length > 1 ? el("p", { class: "muted small" }, others.length ? `Here: ${others.join(", ")}` : "\u00a0") : "",
    el("div", { class: "roles" }, roles.map(([role, n]) =>
      el("i", { style: { width: `${100 * n / live}%`, background: roleColour(role) } }))),
    el("div", { class: "key" }, roles.map(([role, n]) => el("span", {},
      el("i", { class: "dot", style: { background: roleColour(role) } }),
      `${role} ${bytes(n)}`))),
    el("table", {}, el("tbody", {}, alive.slice(0, HOLDERS).map((r) => el("tr", {},
      el("td", {}, el("i", { class: "dot", title: r[5], style: { background: roleColour(r[5]) } }),
        el("code", {}, r[0]), el("div", { class: "narrow" }, sourceCode(r[4]))),
      el("td", { class: "wide" }, sourceCode(r[4])),
      el("td", { class: "muted small" }, r[5]),
      el("td", { class: "number" }, bytes(r[1])))))),
    rest.length ? el("p", { class: "muted small" },
      `${rest.length} more hold ${bytes(sum(rest.map((r) => r[1])))}`) : "",
  ];
}
