"use strict";

(() => {
  const STATES = {
    supported: { symbol: "✓", word: "supported", meaning: "a row offers it" },
    experimental: { symbol: "△", word: "experimental", meaning: "a row offers it with --allow-experimental" },
    denied: { symbol: "✕", word: "refused", meaning: "a source says no" },
    none: { symbol: "–", word: "not offered", meaning: "no row offers it" },
  };
  const LEVELS = {
    claimed: "a source says so",
    stale: "its record is of other code than today's",
    simulated: "its code path ran on a simulated device",
    measured: "it ran on that hardware",
  };
  const SOURCES = { zoo: "zoo: this project itself adds it", derived: "derived from a source" };
  const STALE = "Its record is stale: it is of other code than today's, and proves nothing until it is run again.";
  const WIDE = window.matchMedia("(min-width: 68rem)");

  const byId = (id) => document.getElementById(id);

  const levels = rules.LEVELS.filter((level) => level !== "stale" || staleRows().length);
  const statuses = ["supported", "experimental"].map((value) => ({ value, label: value }));
  const filters = [
    ...data.filters,
    { name: "status", title: "Status", options: statuses },
    { name: "evidence", title: "Evidence", options: levels.map((value) => ({ value, label: levelText(value) })) },
  ];
  const cells = new Map(data.families.flatMap(cellsOf).map((cell) => [cell.key, cell]));

  function staleRows() {
    return data.families.flatMap((family) => family.rows.filter((row) => row.stale));
  }

  function cellsOf(family) {
    const key = (size, product) => `${size.model}@${product.name}`;
    const cell = (size, product) => ({ key: key(size, product), family, size, product, hardware: product.name });
    return family.sizes.flatMap((size) => data.products.map((product) => cell(size, product)));
  }

  /** An element; attributes that are false are left out, and so are children that are null. */
  function make(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null));
    return node;
  }

  function levelText(level, evidence = "simulated") {
    return level === "stale" ? `${evidence} (stale)` : level;
  }

  const words = (name) => name.replaceAll("_", " ");
  const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
  const valueText = (values) => values.map((value) => ({ true: "yes", false: "no" })[value] || value).join(", ");
  const axisTitle = (axis) => data.filters.find((filter) => filter.name === axis).title;

  /* The state is what the URL's fragment says, as far as it names filters, values and a cell that there are. */

  function readState() {
    const state = { wanted: {}, cell: null };
    for (const pair of location.hash.slice(1).split("&")) {
      const [name, value] = pair.split("=").map(decode);
      const filter = filters.find((one) => one.name === name);
      if (filter && filter.options.some((one) => one.value === value)) state.wanted[name] = value;
      if (name === "cell" && cells.has(value)) state.cell = cells.get(value);
    }
    return state;
  }

  function decode(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  }

  function writeState({ wanted, cell }) {
    const pairs = Object.entries({ ...wanted, ...(cell && { cell: cell.key }) });
    const hash = pairs.map(([name, value]) => `${name}=${encode(value)}`).join("&");
    if (hash !== location.hash.slice(1)) location.hash = hash;
  }

  const encode = (text) => encodeURIComponent(text).replace(/%(3A|40|2B)/g, decodeURIComponent);

  /* The filters. */

  function buildFilters() {
    byId("fields").append(...filters.map(filterField));
    byId("filters").querySelector("details").open = WIDE.matches || Object.keys(readState().wanted).length > 0;
  }

  function filterField({ name, title, options }) {
    const choices = (listed) => listed.map(({ value, label }) => make("option", { value }, label));
    const groups = rules.unique(options.map((one) => one.group)).flatMap((group) => {
      const members = choices(options.filter((one) => one.group === group));
      return group ? make("optgroup", { label: group }, members) : members;
    });
    const select = make("select", { name }, make("option", { value: "" }, "any"), groups);
    return make("label", {}, make("span", {}, title), select);
  }

  function readFilters() {
    return Object.fromEntries([...new FormData(byId("filters"))].filter(([, value]) => value));
  }

  function showFilters(wanted) {
    for (const select of byId("fields").querySelectorAll("select")) {
      select.value = wanted[select.name] || "";
      select.toggleAttribute("data-active", select.value !== "");
    }
    const count = Object.keys(wanted).length;
    byId("active").textContent = count ? `(${count} set)` : "";
    byId("clear").hidden = count === 0;
  }

  /* Marks of status and evidence: a symbol and a word each. */

  function stateMark(state) {
    const symbol = make("span", { class: "symbol", "aria-hidden": "true" }, STATES[state].symbol);
    const word = make("span", { class: "word" }, STATES[state].word);
    return make("span", { class: "state", "data-state": state }, symbol, word);
  }

  function levelMark(level, text) {
    const meter = make("span", { class: "meter", "aria-hidden": "true" }, make("i", {}), make("i", {}), make("i", {}));
    return make("span", { class: "level", "data-level": level }, meter, make("span", { class: "word" }, text));
  }

  function buildLegend() {
    const states = Object.entries(STATES).map(([state, { meaning }]) => [stateMark(state), meaning]);
    const proofs = levels.map((level) => [levelMark(level, levelText(level)), LEVELS[level]]);
    for (const [name, entries] of [["Status", states], ["Evidence", proofs]]) {
      const list = entries.flatMap(([mark, meaning]) => [make("dt", {}, mark), make("dd", {}, meaning)]);
      byId("legend").append(make("div", {}, make("h2", {}, name), make("dl", {}, list)));
    }
  }

  /* The grid: built once, so that a cell keeps its focus while filters change. */

  function buildGrid() {
    const columns = data.products.map(({ name, title }) =>
      make("th", { scope: "col", "data-hardware": name }, title, make("code", {}, name)),
    );
    byId("grid").tHead.append(make("tr", {}, make("th", { scope: "col" }, "Size"), columns));
    byId("grid").append(...data.families.map(familyBody));
  }

  function familyBody(family) {
    const head = make("th", { scope: "rowgroup" }, family.title, make("code", {}, family.name));
    return make("tbody", {}, make("tr", { class: "family" }, head), family.sizes.map((size) => sizeRow(family, size)));
  }

  function sizeRow(family, size) {
    const buttons = cellsOf(family).filter((cell) => cell.size === size).map((cell) => {
      const attributes = { type: "button", class: "cell", "data-cell": cell.key, "aria-haspopup": "dialog" };
      return make("td", { "data-hardware": cell.hardware }, make("button", attributes));
    });
    const head = make("th", { scope: "row" }, size.name);
    return make("tr", { "data-model": `${family.name}:${size.name}` }, head, buttons);
  }

  function showGrid(wanted, open) {
    const grid = byId("grid");
    for (const node of grid.querySelectorAll("[data-hardware]")) {
      node.hidden = "hardware" in wanted && node.dataset.hardware !== wanted.hardware;
    }
    for (const row of grid.querySelectorAll("[data-model]")) {
      row.hidden = "model" in wanted && !`${row.dataset.model}:`.startsWith(`${wanted.model}:`);
    }
    for (const body of grid.tBodies) body.hidden = !body.querySelector("[data-model]:not([hidden])");
    const columns = grid.tHead.querySelectorAll("th:not([hidden])").length;
    for (const head of grid.querySelectorAll(".family th")) head.colSpan = columns;
    grid.style.setProperty("--columns", columns - 1);
    for (const button of grid.querySelectorAll("button")) showCell(button, wanted, open);
    showSummary();
  }

  function showCell(button, wanted, open) {
    const cell = cells.get(button.dataset.cell);
    const { state, level, found } = rules.answer(cell, wanted);
    const proven = level && levelText(level, found[0].row.evidence);
    const said = [`${cell.family.title} ${cell.size.name} on ${cell.product.title}`, STATES[state].word];
    button.dataset.state = state;
    button.setAttribute("aria-label", [...said, ...(proven ? [proven] : [])].join(", "));
    button.replaceChildren(stateMark(state), ...(proven ? [levelMark(level, proven)] : []));
    if (cell === open) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }

  function showSummary() {
    const shown = [...byId("grid").querySelectorAll("tr:not([hidden]) > td:not([hidden]) > button")];
    const count = (state) => shown.filter((button) => button.dataset.state === state).length;
    const [supported, experimental] = [count("supported"), count("experimental")];
    const offered = supported + experimental;
    const parts = [`${supported} supported`, `${experimental} experimental`, `${shown.length - offered} not offered`];
    byId("summary").textContent = `${offered} of ${counted(shown.length, "cell")}: ${parts.join(", ")}`;
  }

  /* The panel of one cell. */

  function showPanel({ wanted, cell }) {
    const panel = byId("panel");
    if (!cell) {
      panel.close();
      return;
    }
    const shown = JSON.stringify([cell.key, wanted]);
    if (panel.open && panel.dataset.shown === shown) return;
    const moved = !panel.open || panel.dataset.cell !== cell.key;
    Object.assign(panel.dataset, { shown, cell: cell.key });
    panel.replaceChildren(...panelContent(cell, wanted));
    if (moved) openPanel(panel);
  }

  /** Open it anew, so that closing it gives the focus back to its cell. */
  function openPanel(panel) {
    panel.close();
    byId("grid").querySelector(`[data-cell="${panel.dataset.cell}"]`).focus();
    if (WIDE.matches) panel.show();
    else panel.showModal();
    panel.scrollTop = 0;
  }

  function panelContent(cell, wanted) {
    const answer = rules.answer(cell, wanted);
    const matching = answer.found.map((found) => found.row);
    const others = rules.answer(cell, {}).found.map((found) => found.row).filter((row) => !matching.includes(row));
    const blocks = [
      panelHeader(cell),
      answer.reasons.length ? refusalBlock(answer, wanted) : null,
      ...matching.map((row, number) => rowCard(cell, row, wanted, `row-${number}`)),
      others.length ? otherRows(cell, others, matching.length) : null,
      denialBlock(rules.denials(cell)),
      listBlock("Exclude each other", cell.family.conflicts.map(conflictText)),
      make("p", { class: "faint" }, `Variants of this size: ${cell.size.variants.join(", ")}`),
    ];
    return blocks.filter(Boolean);
  }

  function panelHeader(cell) {
    const close = make("button", { type: "button", class: "close", "aria-label": "Close" }, "✕");
    close.addEventListener("click", () => byId("panel").close());
    const hardware = make("small", {}, ` on ${cell.product.title}`);
    const title = make("h2", { id: "panel-title" }, `${cell.family.title} ${cell.size.name}`, hardware);
    return make("header", {}, title, close);
  }

  function refusalBlock({ state, reasons }, wanted) {
    const { model, hardware, ...asked } = wanted;
    const values = Object.values(asked).join(", ");
    const heading = make("h3", {}, stateMark(state), values ? ` with ${values}` : "");
    const list = make("ul", {}, reasons.map((reason) => make("li", {}, reason.text)));
    return make("section", { class: "refusal", "data-state": state }, heading, list);
  }

  function otherRows(cell, rows, matching) {
    const count = counted(rows.length, matching ? "further row" : "row");
    const cards = rows.map((row, number) => rowCard(cell, row, {}, `other-${number}`));
    return make("details", { class: "others" }, make("summary", {}, `${count} with other values`), cards);
  }

  function denialBlock(denials) {
    if (denials.length === 0) return null;
    const groups = rules.unique(denials.map((denial) => denial.source)).flatMap((source) => {
      const lines = denials.filter((denial) => denial.source === source).map(denialText);
      return [make("p", { class: "cite faint" }, source), make("ul", {}, lines.map((line) => make("li", {}, line)))];
    });
    return make("section", {}, make("h3", {}, "The sources say no to"), groups);
  }

  function denialText({ axis, values, reason }) {
    return `${axisTitle(axis)} ${valueText(values)}${reason ? `: ${reason}` : ""}`;
  }

  function conflictText({ first, second, reason }) {
    return `${first.join("=")} excludes ${second.join("=")}: ${reason}`;
  }

  function listBlock(heading, lines) {
    if (lines.length === 0) return null;
    return make("section", {}, make("h3", {}, heading), make("ul", {}, lines.map((line) => make("li", {}, line))));
  }

  /* A row: its values to choose from, what proves it, and the commands that run what is chosen. */

  function rowCard(cell, row, wanted, id) {
    const card = make("article", { class: "row", id });
    let chosen = rules.point(cell, row, wanted);
    drawCard(card, cell, row, chosen);
    card.addEventListener("change", ({ target }) => {
      chosen = choose(cell, row, chosen, target.dataset.axis, target.value);
      drawCard(card, cell, row, chosen);
      byId(target.id).focus();
    });
    return card;
  }

  /** The combination with a new value that keeps what can be kept of the old one. */
  function choose(cell, row, old, axis, value) {
    const kept = Object.fromEntries(rules.COMBINED.map((name) => [name, rules.spell(old[name])]));
    if (axis !== "split" && axis !== "world_size") kept.split = old.split.name;
    return rules.point(cell, row, { ...kept, [axis]: value }) || rules.point(cell, row, { [axis]: value }) || old;
  }

  function drawCard(card, cell, row, chosen) {
    const level = rules.level(row, chosen.world_size);
    const marks = [stateMark(row.status), levelMark(level, levelText(level, row.evidence))];
    card.replaceChildren(
      make("h3", {}, marks, make("span", { class: "faint" }, unusual(row))),
      make("p", {}, make("span", { class: "faint" }, "Source "), SOURCES[row.source] || row.source),
      make("div", { class: "axes" }, axisChoices(card.id, cell, row, chosen)),
      ...notesOf(row).map((note) => make("p", { class: "note" }, note)),
      ...evidenceBlocks(cell, row),
      commandBlock(cell, row, chosen),
    );
  }

  /** What tells a row from the others of its cell at a glance. */
  function unusual(row) {
    const axes = Object.keys(rules.USUAL).filter((axis) => row[axis].some((value) => value !== rules.USUAL[axis]));
    return axes.map((axis) => `${axisTitle(axis)} ${valueText(row[axis])}`).join(", ");
  }

  function axisChoices(id, cell, row, chosen) {
    const plain = (values) => values.map((value) => ({ value, text: valueText([value]) }));
    const choices = Object.fromEntries(rules.COMBINED.map((axis) => [axis, plain(row[axis])]));
    choices.world_size = plain(rules.unique(row.splits.map((split) => split.world_size)));
    choices.split = row.splits
      .filter((split) => split.world_size === chosen.world_size)
      .map((split) => ({ value: split.name, text: splitText(split), unfit: split.name in cell.size.unfit }));
    const order = ["dtype", "world_size", "split", ...rules.COMBINED.slice(1)];
    const current = { ...chosen, split: chosen.split.name };
    return order.map((axis) => axisChoice(`${id}-${axis}`, axis, choices[axis], current[axis], row.derived));
  }

  const splitText = (split) => (split.world_size === 1 ? "one device" : split.text);

  function axisChoice(id, axis, values, current, derived) {
    const named = axis === "split" ? "parallelism" : axis;
    const follows = make("abbr", { title: "follows from the source without being stated in it" }, "derived");
    const legend = make("legend", {}, axisTitle(named), derived.includes(named) ? follows : null);
    if (values.length === 1) return make("fieldset", { class: "single" }, legend, make("span", {}, values[0].text));
    const chips = values.map(({ value, text, unfit = false }, number) => {
      const input = make("input", { type: "radio", id: `${id}-${number}`, name: id, "data-axis": axis, value });
      input.checked = value === current;
      return make("label", { "data-unfit": unfit }, input, make("span", {}, text));
    });
    return make("fieldset", {}, legend, make("div", { class: "chips" }, chips));
  }

  function notesOf(row) {
    const copies = "key-value heads are copied where tensor parallel exceeds them";
    return [...(row.note ? [row.note] : []), ...(row.replicated_kv_heads ? [copies] : [])];
  }

  function evidenceBlocks(cell, row) {
    if (row.evidence === "claimed") return [];
    const rest = row.world_size.filter((size) => rules.level(row, size) === "claimed").join(", ");
    const devices = row.evidence_devices.join(", ");
    const where = rest ? ` with ${devices} device${devices === "1" ? "" : "s"}; with ${rest} it is a claim` : "";
    const text = `${row.evidence[0].toUpperCase()}${row.evidence.slice(1)}${where}.${row.stale ? ` ${STALE}` : ""}`;
    return [make("p", { class: "evidence" }, text), ...row.records.map((record) => recordBlock(cell, record))];
  }

  function recordBlock(cell, record) {
    const here = record.figures.filter((figure) => !figure.hardware || figure.hardware === cell.hardware);
    return make(
      "details",
      { class: "record" },
      make("summary", {}, `Record of ${record.date}: ${record.level}`),
      make("h4", {}, "What ran"),
      definitions(Object.entries(record.shape).map(([name, value]) => [words(name), value])),
      make("h4", {}, "Versions"),
      definitions(Object.entries(record.versions)),
      here.length ? figureTable(here) : null,
    );
  }

  function definitions(entries) {
    return make("dl", {}, entries.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));
  }

  /** Figures by what ran, a column for each that was measured. */
  function figureTable(figures) {
    const metrics = rules.unique(figures.map((figure) => figure.metric));
    const head = ["Run", ...metrics.map(words)].map((text) => make("th", { scope: "col" }, text));
    const rows = rules.unique(figures.map((figure) => figure.run)).map((run) => {
      const value = (metric) => figures.find((figure) => figure.run === run && figure.metric === metric)?.value;
      const measured = metrics.map((metric) => make("td", {}, String(value(metric) ?? "")));
      return make("tr", {}, make("th", { scope: "row" }, run), measured);
    });
    const table = make("table", {}, make("thead", {}, make("tr", {}, head)), make("tbody", {}, rows));
    return make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Figures" }, table);
  }

  /* Commands. */

  function commandBlock(cell, row, chosen) {
    const lines = rules.commands(cell, row, chosen);
    const button = make("button", { type: "button", class: "copy" }, "Copy");
    const code = make("pre", { tabindex: "0" }, make("code", {}, lines.map(commandLine)));
    button.addEventListener("click", () => copy(lines.join("\n"), code, button));
    const hints = hintsOf(cell, chosen, lines).map((hint) => make("p", { class: "faint" }, hint));
    const caution = cell.size.unfit[chosen.split.name];
    const warning = `The matrix offers this split; the model's shape refuses it: ${caution}`;
    return make(
      "div",
      { class: "command" },
      make("h4", {}, lines.length > 1 ? "Commands" : "Command", button),
      code,
      hints,
      caution ? make("p", { class: "caution" }, warning) : null,
    );
  }

  /** A line that wraps between options alone. */
  function commandLine(line) {
    return make("span", {}, line.split(/ (?=--)/).flatMap((part) => [make("b", {}, part), " "]));
  }

  function hintsOf(cell, chosen, lines) {
    const run = lines.at(-1);
    const given = run.includes("--weights") && !cell.size.pulled;
    return [
      ...(run.includes(" launch ") ? ["The same on each node; ADDRESS is the first one's."] : []),
      ...(given ? ["weights is the directory of a checkpoint of this architecture."] : []),
    ];
  }

  async function copy(text, node, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      window.getSelection().selectAllChildren(node);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    byId("said").textContent = "Copied";
    setTimeout(() => {
      button.textContent = "Copy";
      byId("said").textContent = "";
    }, 1500);
  }

  /* What happens. */

  function show() {
    const state = readState();
    showFilters(state.wanted);
    showGrid(state.wanted, state.cell);
    showPanel(state);
  }

  function listen() {
    const panel = byId("panel");
    window.addEventListener("hashchange", show);
    byId("filters").addEventListener("change", () => writeState({ ...readState(), wanted: readFilters() }));
    byId("filters").addEventListener("reset", () => writeState({ ...readState(), wanted: {} }));
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("grid").addEventListener("click", ({ target }) => {
      const button = target.closest("button");
      if (button) writeState({ ...readState(), cell: cells.get(button.dataset.cell) });
    });
    panel.addEventListener("close", () => {
      if (!panel.open) writeState({ ...readState(), cell: null });
    });
    document.addEventListener("keydown", ({ key }) => {
      if (key === "Escape") panel.close();
    });
    WIDE.addEventListener("change", () => {
      if (panel.open) openPanel(panel);
    });
  }

  buildFilters();
  buildGrid();
  buildLegend();
  listen();
  byId("tables").open = false;
  for (const node of document.querySelectorAll(".scripted")) node.hidden = false;
  show();
})();
