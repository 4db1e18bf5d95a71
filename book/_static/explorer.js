/* The explorer page: dials choose among the settings; picture, table, commands and the page's address follow.
   Data and values come from explorer/data.js, made from the records by book/_extensions/explorer.py. */
(() => {
  "use strict";
  const root = document.querySelector(".explorer");
  const data = window.explorerData;
  if (!root || !data) return;

  const form = root.querySelector(".explorer-dials");
  const status = root.querySelector(".explorer-status");
  const choice = root.querySelector(".explorer-choice");
  const panel = document.querySelector(".explorer-commands");
  const table = document.querySelector(".explorer-table table");
  const search = document.querySelector("#explorer-search");
  const settings = new Map(data.settings.map((setting) => [setting.id, setting]));
  const boxes = [...form.elements.method];
  const dials = Object.keys(data.dials);
  const state = { chosen: "", sort: "" };
  let view = null;

  // --- where the dials stand ---------------------------------------------------------------------------------------

  const stops = (slider) => ["", ...slider.dataset.stops.split(" ").slice(1)];

  function read(name) {
    const control = form.elements[name];
    return control.type === "range" ? stops(control)[control.value] : control.value;
  }

  function put(name, value) {
    const control = form.elements[name];
    if (control.type === "range") control.value = Math.max(0, stops(control).indexOf(value));
    else if ([...control.options].some((option) => option.value === value)) control.value = value;
  }

  function describeSliders() {
    for (const slider of form.querySelectorAll("input[type=range]")) {
      const value = read(slider.name);
      const words = value === "" ? "all" : /^\d{5,}$/.test(value) ? Number(value).toLocaleString("en") : value;
      slider.setAttribute("aria-valuetext", words);
      form.querySelector(`output[for="${slider.id}"]`).value = words;
    }
  }

  const checked = () => boxes.filter((box) => box.checked).map((box) => box.value);

  function shown() {
    const methods = new Set(checked());
    const profile = read("profile");
    const wanted = dials.map((name) => [name, read(name)]).filter(([, value]) => value !== "");
    const words = search.value.trim().toLowerCase();
    return data.settings.filter(
      (setting) =>
        setting.profile === profile &&
        methods.has(setting.method) &&
        wanted.every(([name, value]) => setting[name] === null || setting[name] === value) &&
        (!words || rows.get(setting.id).textContent.toLowerCase().includes(words)),
    );
  }

  // --- the address of the page -------------------------------------------------------------------------------------

  function write() {
    const address = new URLSearchParams();
    if (read("profile") !== root.dataset.profile) address.set("profile", read("profile"));
    if (checked().length < boxes.length) address.set("method", checked().join(","));
    for (const name of dials) if (read(name) !== "") address.set(name, read(name));
    if (form.elements.zoom.checked) address.set("zoom", "1");
    if (search.value.trim()) address.set("rows", search.value.trim());
    if (state.sort) address.set("sort", state.sort);
    if (state.chosen) address.set("setting", state.chosen);
    const words = address.toString().replaceAll("%2C", ",");
    if (!words && !location.hash.includes("=")) return; // the link to a section stays
    try {
      history.replaceState(null, "", location.href.split("#")[0] + (words && `#${words}`));
    } catch {
      // a browser may refuse this for files
    }
  }

  function restore() {
    const address = new URLSearchParams(location.hash.slice(1));
    if (location.hash && !location.hash.includes("=")) return; // the link to a section
    put("profile", address.get("profile") || root.dataset.profile);
    const methods = address.has("method") ? address.get("method").split(",") : null;
    for (const box of boxes) box.checked = !methods || methods.includes(box.value);
    for (const name of dials) put(name, address.get(name) || "");
    form.elements.zoom.checked = address.get("zoom") === "1";
    search.value = address.get("rows") || "";
    state.chosen = settings.has(address.get("setting")) ? address.get("setting") : "";
    sort(address.get("sort") || "");
  }

  // --- table -------------------------------------------------------------------------------------------------------

  const body = table.tBodies[0];
  const rows = new Map([...body.rows].map((row) => [row.dataset.id, row]));
  const order = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];

  function sort(by) {
    const column = heads.findIndex((head) => head.textContent === by.replace(/^-/, ""));
    state.sort = column < 0 ? "" : by;
    const sign = by.startsWith("-") ? -1 : 1;
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.replaceAll(",", "");
    const compare = (one, other) => {
      const [a, b] = [key(one), key(other)];
      if (a === "–" || b === "–") return (a === "–") - (b === "–"); // what has no value comes last, both ways
      return sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    };
    heads.forEach((head, index) => {
      if (index === column) head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    body.append(...(column < 0 ? order : [...order].sort(compare)));
  }

  // --- commands ----------------------------------------------------------------------------------------------------

  function element(tag, words = "", properties = {}) {
    const made = Object.assign(document.createElement(tag), properties);
    if (words) made.append(words);
    return made;
  }

  function command(words, text) {
    const box = element("div", "", { className: "explorer-command" });
    const caption = element("p", words);
    const pre = element("pre", text, { tabIndex: 0 });
    pre.setAttribute("role", "region");
    pre.setAttribute("aria-label", words);
    const button = element("button", "copy", { type: "button" });
    button.setAttribute("aria-label", `copy: ${words}`);
    button.addEventListener("click", () => copy(pre, button));
    caption.append(" ", button);
    box.append(caption, pre);
    return box;
  }

  async function copy(pre, button) {
    try {
      await navigator.clipboard.writeText(pre.textContent);
    } catch {
      // pages opened as files have no clipboard interface; the selection always works
      getSelection().selectAllChildren(pre);
      document.execCommand("copy");
    }
    button.textContent = "copied";
    setTimeout(() => (button.textContent = "copy"), 2000);
  }

  const percent = (value, digits) => (value === null ? "–" : `${(100 * value).toFixed(digits)} %`);

  function runsTable(setting) {
    const columns = {
      seed: (run) => run.seed,
      forgetting: (run) => percent(run.forgetting, 2),
      learning: (run) => percent(run.learning, 1),
      "bits per byte, original": (run) => run.bits_per_byte_unseen_original.toFixed(3),
      "bits per byte, new": (run) => run.bits_per_byte_new.toFixed(3),
      seconds: (run) => run.seconds,
      machine: (run) => run.device,
      commit: (run) => run.git_commit.slice(0, 10),
      record: (run) => `data/results/${run.run_id}.json`,
    };
    const made = element("table");
    made.createTHead().append(element("tr"));
    for (const name of Object.keys(columns)) made.tHead.rows[0].append(element("th", name, { scope: "col" }));
    const content = made.createTBody();
    for (const run of setting.runs) {
      const row = content.insertRow();
      for (const cell of Object.values(columns)) row.insertCell().textContent = cell(run);
    }
    const region = element("div", "", { className: "explorer-table", tabIndex: 0 });
    region.setAttribute("role", "region");
    region.setAttribute("aria-label", "Runs of the setting");
    region.append(made);
    return region;
  }

  function notebookCommands(found) {
    const pairs = new Map();
    for (const setting of found)
      for (const run of setting.runs) {
        const text = data.notebooks[run.notebook]?.[setting.profile];
        if (text) pairs.set(text, run.notebook);
      }
    return [...pairs].map(([text]) => text).join("\n");
  }

  function missing() {
    // What would make a run no record has: for the method most of the dials speak of, where they do not clash.
    const set = dials.filter((name) => read(name) !== "");
    const has = (method) => set.filter((name) => data.methods[method].includes(name));
    const [method] = checked().sort((one, other) => has(other).length - has(one).length);
    if (!method || search.value.trim()) return "";
    const own = has(method);
    const positions = new Set(own.map((name) => `${name}=${read(name)}`));
    const clashes = data.conflicts[read("profile")][method];
    if (clashes.some((clash) => clash.every((position) => positions.has(position)))) return "";
    const words = own.map((name) => data.dials[name][read(name)]);
    return ["nrlib extend --profile", read("profile"), "--method", method, ...words].join(" ");
  }

  function showCommands(found) {
    const setting = settings.get(state.chosen);
    const reproduce = (some) =>
      ["nrlib reproduce", ...some.flatMap((one) => one.runs).map((run) => `--run ${run.run_id}`)].join(" ");
    panel.replaceChildren();
    if (setting) {
      const title = element("p", "", { className: "explorer-chosen" });
      const close = element("button", "show all again", { type: "button" });
      close.addEventListener("click", () => choose(""));
      title.append(element("strong", data.labels[setting.id]), " ", close);
      const runs = setting.runs.map((run) => run.command).join("\n");
      panel.append(title, runsTable(setting), command("Show these runs, or change a value:", runs));
      panel.append(command("Train them again and compare:", reproduce([setting])));
      appendNotebooks([setting]);
    } else if (found.length) {
      panel.append(command("Train what is shown again and compare:", reproduce(found)));
      appendNotebooks(found);
    } else {
      const text = missing();
      panel.append(element("p", "No published run has these values: turn a dial back to “all”, or add a method."));
      if (text) panel.append(command("This would make one:", text));
    }
  }

  function appendNotebooks(found) {
    const text = notebookCommands(found);
    const many = text.includes("\n");
    if (text) panel.append(command(`Execute the ${many ? "notebooks" : "notebook"} with these runs:`, text));
  }

  // --- picture -----------------------------------------------------------------------------------------------------

  function point(setting) {
    const { id, method, seeds, forgetting, learning } = setting;
    return { id, method, seeds, forgetting, learning, label: data.labels[id] };
  }

  function frame(found) {
    // As explorer_plot.frame.
    const limits = (name) => found.flatMap((setting) => setting[`${name}_range`]);
    const [learning, forgetting] = [limits("learning"), limits("forgetting")];
    const top = 1.3 * Math.max(...forgetting, 0.005);
    const bottom = Math.min(0, 1.3 * Math.min(...forgetting));
    const ticks = data.ticks.filter((tick) => bottom <= tick && tick <= top);
    return { left: Math.min(...learning) - 0.02, right: Math.max(...learning) + 0.02, bottom, top, ticks };
  }

  function draw(found) {
    if (!view) return;
    const placed = (setting) => setting.learning !== null;
    const drawn = found.filter(placed);
    const framed = form.elements.zoom.checked && drawn.length ? drawn : data.settings.filter((s) => s.profile === read("profile") && placed(s));
    if (framed.length) for (const [name, value] of Object.entries(frame(framed))) view.signal(name, value);
    view.data("settings", drawn.map(point));
    view.data("runs", drawn.flatMap(({ id, method, runs }) => runs.map((run) => ({ id, method, forgetting: run.forgetting, learning: run.learning }))));
    view.data("chosen", drawn.filter((setting) => setting.id === state.chosen).map(point));
    view.runAsync();
    const plot = root.querySelector(".explorer-plot");
    plot.setAttribute("aria-label", `Learning against forgetting of ${drawn.length} settings. The table lists them.`);
  }

  function loadPicture() {
    const script = element("script", "", { src: root.dataset.vega });
    script.addEventListener("load", async () => {
      const plot = root.querySelector(".explorer-plot");
      const box = element("div", "", { className: "explorer-vega" });
      const picture = plot.querySelector("img");
      picture.hidden = true;
      plot.append(box);
      const made = await window.vegaEmbed(box, data.plot, { mode: "vega-lite", renderer: "svg", actions: false });
      picture.remove();
      plot.setAttribute("role", "img"); // a picture of what the table says, not hundreds of shapes
      view = made.view;
      view.addEventListener("click", (_, item) => item?.datum?.id && choose(item.datum.id));
      draw(shown());
      new ResizeObserver(() => view.width(box.clientWidth).height(box.clientHeight).runAsync()).observe(box);
    });
    script.addEventListener("error", () => status.append(" The live picture could not be loaded; this one shows all runs."));
    document.head.append(script);
  }

  // --- everything together -----------------------------------------------------------------------------------------

  function update() {
    describeSliders();
    const found = shown();
    const ids = new Set(found.map((setting) => setting.id));
    if (!ids.has(state.chosen)) state.chosen = "";
    for (const [id, row] of rows) {
      row.hidden = !ids.has(id);
      row.classList.toggle("explorer-chosen", id === state.chosen);
      row.querySelector("button").setAttribute("aria-pressed", id === state.chosen);
    }
    const runs = found.reduce((sum, setting) => sum + setting.runs.length, 0);
    const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
    status.textContent = `Shown: ${count(runs, "run")} of ${count(found.length, "setting")}.`;
    choice.hidden = !state.chosen;
    choice.querySelector("strong").textContent = data.labels[state.chosen] || "";
    showCommands(found);
    draw(found);
    write();
  }

  function choose(id) {
    state.chosen = id === state.chosen ? "" : id;
    update();
  }

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    search.value = "";
    state.chosen = "";
    setTimeout(() => {
      sort("");
      update();
    });
  });
  search.addEventListener("input", update);
  form.querySelector(".explorer-methods").addEventListener("click", (event) => {
    const { every } = event.target.dataset;
    if (every === undefined) return;
    for (const box of boxes) box.checked = every === "true";
    update();
  });
  body.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    choose(button.closest("tr").dataset.id);
    panel.scrollIntoView({ block: "nearest" });
  });
  choice.querySelector("button").addEventListener("click", () => {
    panel.scrollIntoView({ block: "center" });
    panel.querySelector("button").focus({ preventScroll: true });
  });
  table.tHead.addEventListener("click", (event) => {
    const name = event.target.closest("button")?.textContent;
    if (!name) return;
    sort(state.sort === name ? `-${name}` : name);
    update();
  });
  addEventListener("hashchange", () => {
    restore();
    update();
  });

  restore();
  update();
  (window.requestIdleCallback || setTimeout)(loadPicture);
})();
