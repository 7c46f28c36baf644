"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  let run = null;
  let page = 0;

  // Whatever comes from the data becomes text, never markup.
  function make(name, options = {}, ...children) {
    const node = document.createElement(name);
    Object.entries(options).forEach(([key, value]) => {
      if (key === "text") node.textContent = value;
      else if (key === "onclick") node.addEventListener("click", value);
      else node.setAttribute(key, value);
    });
    node.append(...children);
    return node;
  }

  async function ask(path, options) {
    const answer = await fetch(path, options);
    const found = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
    if (found.error) throw new Error(found.error);
    return found;
  }

  const signed = (value) => (value === null || value === undefined ? "–"
    : `${value < 0 ? "−" : "+"}${Math.abs(value).toPrecision(3)}`);
  const sign = (value) => (value < 0 ? "negative" : "positive");

  function list(rows, into, score) {
    into.replaceChildren(...rows.map((row) => {
      const tags = Object.keys(run.columns).slice(0, 2).map((column) => row.tags[column]).filter((tag) => tag !== null && tag !== undefined);
      const numbers = make("span", { class: "numbers" });
      if (score) numbers.append(make("span", { class: `amount ${sign(row.score)}`, text: signed(row.score), title: "influence on the text" }));
      numbers.append(make("span", { class: score ? "muted" : `amount ${sign(row.value)}`, text: score ? `value ${signed(row.value)}` : signed(row.value), title: "in-run value" }));
      return make("button", { type: "button", class: "item", onclick: () => open(row.id) },
        numbers, make("span", { class: "tag", text: tags.join(" · ") || row.id }), make("span", { class: "words", text: row.text || row.id }));
    }));
    if (!rows.length) into.append(make("p", { class: "muted", text: "Nothing is left by this filter." }));
  }

  function choose(select, values, label = (value) => value) {
    select.replaceChildren(...values.map((value) => make("option", { value, text: label(value) })));
  }

  const filter = () => ({ target: $("target").value, column: $("column").value, group: $("group").value, words: $("words").value });

  let asked = 0;
  async function show() {
    links();
    const own = ++asked, query = new URLSearchParams({ ...filter(), order: $("order").value, page });
    const found = await ask(`/api/documents?${query}`);
    if (own !== asked) return; // the answer to an older question
    list(found.rows, $("documents"), false);
    const last = Math.max(0, Math.ceil(found.total / found.size) - 1);
    $("page").textContent = found.total ? `${found.page * found.size + 1}–${Math.min(found.total, (found.page + 1) * found.size)} of ${found.total.toLocaleString("en")}` : "0 documents";
    $("back").disabled = page === 0;
    $("forth").disabled = page >= last;
    const share = run.targets.find((target) => target.name === $("target").value)?.explained;
    $("explained").textContent = share === null || share === undefined ? "The real loss drop of this target was not measured."
      : `Value: how much the document lowered (+) or raised (−) this target’s loss in the run, in that loss’s unit. The account explains ${(100 * share).toFixed(0)} % of the real drop.`;
  }

  function links() {
    $("export").href = `/api/export?${new URLSearchParams(filter())}`;
    $("export-positive").href = `/api/export?${new URLSearchParams({ ...filter(), drop: "negative" })}`;
  }

  async function search() {
    $("state").textContent = "looking …";
    $("ask").disabled = true;
    try {
      const { target, column, group } = filter();
      const body = JSON.stringify({ text: $("text").value, target, column, group, order: $("order-asked").value });
      const found = await ask("/api/search", { method: "POST", headers: { "content-type": "application/json" }, body });
      list(found.rows, $("answers"), true);
      $("state").textContent = `${found.rows.length} of ${found.of.toLocaleString("en")} documents`;
    } catch (error) {
      $("state").textContent = error.message;
      $("answers").replaceChildren();
    } finally {
      $("ask").disabled = false;
    }
  }

  function curve(points) {
    const width = 640, height = 120, pad = 4;
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("class", sign(points.at(-1)?.[1] ?? 0));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", points.map(([step, value]) => `step ${step}: ${signed(value)}`).slice(0, 20).join(", "));
    const steps = points.map(([step]) => step), values = [0, ...points.map(([, value]) => value)];
    const [first, last] = [Math.min(0, ...steps), Math.max(1, ...steps)];
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const x = (step) => pad + (step - first) / (last - first || 1) * (width - 2 * pad);
    const y = (value) => height - pad - (value - low) / (high - low || 1) * (height - 2 * pad);
    const line = (name, attributes) => {
      const node = document.createElementNS(SVG, name);
      Object.entries(attributes).forEach(([key, value]) => node.setAttribute(key, value));
      svg.append(node);
    };
    line("line", { x1: 0, x2: width, y1: y(0), y2: y(0), class: "axis" });
    let path = `M${x(first)},${y(0)}`, before = 0;
    points.forEach(([step, value]) => { path += `L${x(step)},${y(before)}L${x(step)},${y(value)}`; before = value; });
    line("path", { d: `${path}L${x(last)},${y(before)}`, class: "curve" });
    points.forEach(([step, value]) => line("circle", { cx: x(step), cy: y(value), r: 3, class: "point" }));
    return svg;
  }

  async function open(id) {
    const found = await ask(`/api/document?${new URLSearchParams({ id })}`);
    $("document-title").textContent = found.id;
    const facts = [...Object.entries(found.facts), ...Object.entries(found.values).map(([target, value]) => [`value for ${target}`, signed(value)])];
    $("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: value ?? "–" })]));
    $("curves").replaceChildren(...Object.entries(found.curves).map(([target, points]) => {
      const said = points.map(([step, value]) => `${signed(value)} by step ${step}`);
      return make("figure", {}, make("figcaption", { text: `${target}: ${said.slice(-1)[0] ?? "not seen"}` }), curve(points));
    }));
    $("content").textContent = found.text || "The run kept no text.";
    $("document").showModal();
  }

  function groups() {
    const column = $("column").value;
    choose($("group"), ["", ...(run.columns[column] ?? [])], (value) => value || "all");
  }

  const again = () => { page = 0; show().catch((error) => { $("page").textContent = error.message; }); };
  async function start() {
    run = await ask("/api/run");
    $("run").textContent = `${run.path} · ${run.documents.toLocaleString("en")} documents · assay ${run.version}`;
    choose($("target"), run.targets.map((target) => target.name));
    choose($("column"), Object.keys(run.columns));
    groups();
    $("how").textContent = run.search
      ? "By influence functions on the final checkpoint: what the document’s gradient did to the loss of your text. Filters below apply here too."
      : "This run has no index: start with --build-index to search by influence. Below, documents can be found by their words.";
    $("ask").disabled = $("text").disabled = !run.search;
    ["target", "group", "order"].forEach((id) => $(id).addEventListener("change", again));
    $("column").addEventListener("change", () => { groups(); again(); });
    let waiting;
    $("words").addEventListener("input", () => { links(); clearTimeout(waiting); waiting = setTimeout(again, 200); });
    $("back").addEventListener("click", () => { page -= 1; show(); });
    $("forth").addEventListener("click", () => { page += 1; show(); });
    $("ask").addEventListener("click", search);
    $("text").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) search(); });
    $("close").addEventListener("click", () => $("document").close());
    again();
  }
  start().catch((error) => { $("run").textContent = error.message; });
})();
