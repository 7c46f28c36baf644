"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, from = document) => Array.from(from.querySelectorAll(selector));

  // ---- Theme: the system's, unless the reader chose one (remembered where the browser allows it).
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("assay-theme"); } catch { /* a local file may have no storage */ }
  const button = document.getElementById("theme");
  const drawn = new Map(); // plot element -> its figure as sent

  function paint() {
    const theme = chosen ?? (system.matches ? "dark" : "light");
    root.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light page" : "Dark page";
    drawn.forEach((figure, plot) => draw(plot, figure));
  }
  button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("assay-theme", chosen); } catch { /* as above */ }
    paint();
  });
  system.addEventListener("change", paint);

  // ---- Figures: drawn when they come near the window; colours are CSS variables of the current theme.
  const figures = JSON.parse(document.getElementById("figures").textContent);

  function resolved(value, probe) {
    if (Array.isArray(value)) return value.map((item) => resolved(item, probe));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, probe)]));
    }
    if (typeof value !== "string" || !/^var\(--[a-z0-9-]+\)$/.test(value)) return value;
    probe.style.color = value;
    return getComputedStyle(probe).color;
  }

  function template() {
    const axis = { gridcolor: "var(--line)", linecolor: "var(--strong-line)", zerolinecolor: "var(--strong-line)",
      tickcolor: "var(--strong-line)", automargin: true, title: { standoff: 8 } };
    return { layout: {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "var(--muted)" },
      xaxis: { ...axis, showgrid: false, zeroline: false }, yaxis: axis,
      hoverlabel: { bgcolor: "var(--surface)", bordercolor: "var(--strong-line)", font: { color: "var(--ink)" } },
      legend: { font: { color: "var(--ink)" }, bgcolor: "rgba(0,0,0,0)" },
    } };
  }

  function draw(plot, figure) {
    const probe = document.body.appendChild(document.createElement("i"));
    const themed = resolved({ data: figure.data, layout: { ...figure.layout, template: template() } }, probe);
    probe.remove();
    Plotly.react(plot, themed.data, themed.layout, {
      responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]],
    });
  }

  function show(plot) {
    if (drawn.has(plot)) return;
    drawn.set(plot, figures[plot.dataset.figure]);
    draw(plot, figures[plot.dataset.figure]);
  }
  const near = new IntersectionObserver((entries) => {
    entries.filter((entry) => entry.isIntersecting).forEach((entry) => { near.unobserve(entry.target); show(entry.target); });
  }, { rootMargin: "400px" });
  all(".plot").forEach((plot) => near.observe(plot));
  addEventListener("beforeprint", () => all(".plot").filter((plot) => plot.offsetParent).forEach(show));

  // ---- Tabs (without this script all panels simply stand below each other).
  all("[data-tabs]").forEach((box) => {
    const panels = all(":scope > [data-tab]", box);
    const list = document.createElement("div");
    list.setAttribute("role", "tablist");
    list.setAttribute("aria-label", box.dataset.tabs);
    const tabs = panels.map((panel) => {
      const tab = document.createElement("button");
      Object.assign(tab, { type: "button", textContent: panel.dataset.tab, id: `${panel.id}-tab` });
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-controls", panel.id);
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-labelledby", tab.id);
      list.append(tab);
      return tab;
    });
    const select = (index) => tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(i === index));
      tab.tabIndex = i === index ? 0 : -1;
      panels[i].hidden = i !== index;
    });
    tabs.forEach((tab, i) => {
      tab.addEventListener("click", () => select(i));
      tab.addEventListener("keydown", (event) => {
        const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!move) return;
        const next = (i + move + tabs.length) % tabs.length;
        select(next);
        tabs[next].focus();
      });
    });
    box.prepend(list);
    select(0);
  });

  // ---- Tables: sort by a column, filter by words, leaf through pages.
  all(".tablebox").forEach((box) => {
    const table = box.querySelector("table");
    const body = table.tBodies[0];
    const rows = Array.from(body.rows);
    const size = Number(table.dataset.page);
    const input = box.querySelector("input");
    const state = box.querySelector("[role=status]");
    const [back, forth] = all(".pager button", box);
    const words = rows.map((row) => row.textContent.toLowerCase());
    let order = rows.map((_, i) => i);
    let page = 0;

    function update() {
      const wanted = input ? input.value.toLowerCase().split(/\s+/).filter(Boolean) : [];
      const kept = order.filter((i) => wanted.every((word) => words[i].includes(word)));
      page = Math.max(0, Math.min(page, Math.ceil(kept.length / size) - 1));
      rows.forEach((row) => { row.hidden = true; });
      kept.slice(page * size, (page + 1) * size).forEach((i) => { rows[i].hidden = false; });
      if (!state) return;
      const last = Math.min(kept.length, (page + 1) * size);
      state.textContent = kept.length ? `${page * size + 1}–${last} of ${kept.length.toLocaleString("en")}` : "no match";
      back.disabled = page === 0;
      forth.disabled = last >= kept.length;
    }

    function sort(column, header, descending) {
      const keys = rows.map((row) => {
        const cell = row.cells[column];
        return "order" in cell.dataset ? Number(cell.dataset.order) : cell.textContent.trim();
      });
      const numeric = header.classList.contains("number");
      const missing = (key) => numeric && typeof key !== "number";
      order = rows.map((_, i) => i).sort((a, b) => {
        if (missing(keys[a]) || missing(keys[b])) return missing(keys[a]) - missing(keys[b]);
        const sign = numeric ? keys[a] - keys[b] : keys[a].localeCompare(keys[b], "en", { numeric: true });
        return (descending ? -sign : sign) || a - b;
      });
      all("thead th", table).forEach((th) => th.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      body.append(...order.map((i) => rows[i]));
      page = 0;
      update();
    }

    all("thead th", table).forEach((header, column) => {
      header.querySelector("button")?.addEventListener("click", () => {
        const now = header.getAttribute("aria-sort");
        sort(column, header, now ? now === "ascending" : header.classList.contains("number"));
      });
    });
    input?.addEventListener("input", () => { page = 0; update(); });
    back?.addEventListener("click", () => { page -= 1; update(); });
    forth?.addEventListener("click", () => { page += 1; update(); });
    update();
  });

  // ---- Contents: mark the section in view; on a phone, fold the list after a jump.
  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const seen = new Set();
  const spy = new IntersectionObserver((entries) => {
    entries.forEach((entry) => (entry.isIntersecting ? seen.add(entry.target.id) : seen.delete(entry.target.id)));
    const current = Array.from(links.keys()).find((id) => seen.has(id));
    links.forEach((link, id) => (id === current ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
  }, { rootMargin: "-10% 0px -60%" });
  links.forEach((_, id) => spy.observe(document.getElementById(id)));
  const contents = document.querySelector("nav details");
  const narrow = matchMedia("(max-width: 60rem)");
  const fold = () => { contents.open = !narrow.matches; };
  narrow.addEventListener("change", fold);
  contents.addEventListener("click", (event) => { if (narrow.matches && event.target.closest("a")) contents.open = false; });
  fold();
  paint();
})();
