/* The page of a volume server: sortable, filterable, paged tables and plots. Texts reach the page as text nodes only. */
"use strict";

(() => {
  const isNarrow = window.matchMedia("(max-width: 40rem)");
  const pageRows = () => (isNarrow.matches ? 20 : 100); /* on a phone a row is a card */
  const REFRESH_MS = 5000;
  const SVG = "http://www.w3.org/2000/svg";

  const element = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const drawn = (name, attributes = {}, ...children) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };

  const size = (count) => {
    if (count < 1024) return `${count} B`;
    let value = count;
    for (const unit of ["KiB", "MiB", "GiB", "TiB", "PiB"]) {
      value /= 1024;
      if (value < 1024 || unit === "PiB") return `${value.toFixed(2)} ${unit}`;
    }
    return "";
  };

  const meter = (share, label, levels) => {
    const percent = Math.min(Math.max(share, 0), 1) * 100;
    const level = share >= levels[1] ? " bad" : share >= levels[0] ? " warn" : "";
    return drawn(
      "svg",
      { class: `meter${level}`, viewBox: "0 0 100 8", preserveAspectRatio: "none", role: "img", "aria-label": label },
      drawn("rect", { class: "track", width: 100, height: 8 }),
      drawn("rect", { class: "fill", width: percent.toFixed(2), height: 8 }),
    );
  };

  /* How a column shows and sorts a value of a row. */
  const shows = {
    id: (value) => [String(value)],
    text: (value) => [String(value)],
    number: (value) => [value.toLocaleString("en-US")],
    size: (value) => [size(value)],
    flag: (value) => (value ? [element("span", { class: "warn" }, "true")] : ["false"]),
    garbage: (value) => {
      const text = `${(value * 100).toFixed(1)}%`;
      return [meter(value, `garbage ${text}`, [0.3, 0.6]), text];
    },
  };
  const isNumeric = (kind) => kind !== "text" && kind !== "flag";

  /* Turns the table of a section into a live one. columns: [title, key, kind]. */
  class LiveTable {
    constructor(section, columns, rows) {
      this.columns = columns;
      this.rows = rows;
      this.page = 0;
      this.sortBy = 0;
      this.falling = false;
      this.words = [];
      this.table = section.querySelector("table");
      this.body = this.table.querySelector("tbody");
      const title = section.querySelector("h2").textContent;
      this.filter = element("input", { type: "search", placeholder: "Filter", "aria-label": `Filter ${title}` });
      this.filter.addEventListener("input", () => {
        this.words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
        this.page = 0;
        this.select();
      });
      section.querySelector(".bar").append(this.filter);
      this.count = element("span", { "aria-live": "polite" });
      this.back = element("button", { type: "button" }, "Previous");
      this.forth = element("button", { type: "button" }, "Next");
      this.back.addEventListener("click", () => this.turn(-1));
      this.forth.addEventListener("click", () => this.turn(1));
      section.querySelector(".pages").replaceChildren(this.count, this.back, this.forth);
      this.headings();
      this.select();
    }

    headings() {
      const cells = this.columns.map(([title, , kind], index) => {
        const button = element("button", { type: "button" }, title);
        const cell = element("th", { scope: "col", ...(isNumeric(kind) && { class: "n" }) }, button);
        button.addEventListener("click", () => {
          this.falling = this.sortBy === index ? !this.falling : isNumeric(kind) && index > 0;
          this.sortBy = index;
          this.page = 0;
          this.select();
        });
        return cell;
      });
      this.cells = cells;
      this.table.querySelector("thead").replaceChildren(element("tr", {}, ...cells));
    }

    update(rows) {
      this.rows = rows;
      this.select();
    }

    select() {
      const key = this.columns[this.sortBy][1];
      const sign = this.falling ? -1 : 1;
      const searched = this.columns.map((column) => column[1]);
      const wanted = (row) => {
        if (!this.words.length) return true;
        const text = searched.map((name) => row[name]).join(" ").toLowerCase();
        return this.words.every((word) => text.includes(word));
      };
      this.shown = this.rows.filter(wanted);
      this.shown.sort((a, b) => {
        const [x, y] = [a[key], b[key]];
        return (x < y ? -1 : x > y ? 1 : a.id - b.id) * sign;
      });
      this.cells.forEach((cell, index) => {
        if (index === this.sortBy) cell.setAttribute("aria-sort", this.falling ? "descending" : "ascending");
        else cell.removeAttribute("aria-sort");
      });
      this.draw();
    }

    turn(by) {
      this.page += by;
      this.draw();
    }

    draw() {
      const most = pageRows();
      const pages = Math.max(1, Math.ceil(this.shown.length / most));
      this.page = Math.min(Math.max(this.page, 0), pages - 1);
      const start = this.page * most;
      const rows = this.shown.slice(start, start + most).map((row) =>
        element(
          "tr",
          {},
          ...this.columns.map(([title, key, kind]) =>
            element(
              "td",
              { "data-label": title, ...(isNumeric(kind) && { class: "n" }) },
              element("span", {}, ...shows[kind](row[key])),
            ),
          ),
        ),
      );
      this.body.replaceChildren(...rows);
      const from = this.shown.length ? start + 1 : 0;
      this.count.textContent = `${from}–${start + rows.length} of ${this.shown.length}`;
      this.back.disabled = this.page === 0;
      this.forth.disabled = this.page >= pages - 1;
    }
  }

  /* ---- plots ---- */

  let WIDTH = 600; /* that of a plot on the screen, so that texts keep their shape */
  const HEIGHT = 176;
  const LEFT = 52;
  const RIGHT = 8;
  const TOP = 10;
  const BOTTOM = 20;

  const ceiling = (value) => {
    if (!(value > 0)) return 1;
    const unit = 10 ** Math.floor(Math.log10(value));
    return [1, 2, 5, 10].map((step) => step * unit).find((step) => step >= value);
  };
  const short = (value) =>
    value >= 1000 ? `${(value / 1000).toFixed(value >= 10000 ? 0 : 1)}k` : String(+value.toPrecision(3));

  const plot = (title, unit, points, lines) => {
    const top = ceiling(Math.max(0, ...lines.flatMap((line) => points.map((point) => line.of(point) ?? 0))));
    const last = points.length ? points[points.length - 1].t : 0;
    const first = points.length > 1 ? points[0].t : last - 1;
    const x = (t) => LEFT + ((t - first) / Math.max(1, last - first)) * (WIDTH - LEFT - RIGHT);
    const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - TOP - BOTTOM);
    const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
    for (const share of [0, 0.5, 1]) {
      svg.append(
        drawn("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(top * share), y2: y(top * share) }),
        drawn("text", { x: LEFT - 6, y: y(top * share) + 4, "text-anchor": "end" }, short(top * share)),
      );
    }
    const clock = (t) => new Date(t * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
    if (points.length > 1) {
      svg.append(
        drawn("text", { x: LEFT, y: HEIGHT - 5 }, clock(first)),
        drawn("text", { x: WIDTH - RIGHT, y: HEIGHT - 5, "text-anchor": "end" }, clock(last)),
      );
    } else svg.append(drawn("text", { x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "collecting"));
    const caption = element("figcaption", {}, element("strong", {}, `${title} (${unit})`));
    for (const line of lines) {
      let path = "";
      let pen = "M";
      for (const point of points) {
        const value = line.of(point);
        if (value === null || value === undefined) {
          pen = "M";
          continue;
        }
        path += `${pen}${x(point.t).toFixed(1)} ${y(value).toFixed(1)}`;
        if (pen === "M") path += "h0.1";
        pen = "L";
      }
      if (path) svg.append(drawn("path", { class: `line ${line.name}`, d: path, "vector-effect": "non-scaling-stroke" }));
      const now = points.length ? line.of(points[points.length - 1]) : null;
      caption.append(element("span", { class: `key ${line.name}` }, `${line.name} ${now === null || now === undefined ? "–" : short(now)}`));
    }
    return element("figure", {}, caption, svg);
  };

  let drawnPoints = [];
  const plots = (points) => {
    drawnPoints = points;
    const place = document.getElementById("plots");
    const names = ["reads", "writes", "deletes"];
    const lines = (key) => names.map((name) => ({ name, of: (point) => point[name][key] }));
    const draw = () =>
      place.replaceChildren(
        plot("Requests", "per second", points, lines("rate")),
        plot("Latency, median", "ms", points, lines("p50_ms")),
        plot("Latency, 99th percentile", "ms", points, lines("p99_ms")),
      );
    draw();
    const width = Math.round(place.querySelector("svg").getBoundingClientRect().width);
    if (width >= 200 && Math.abs(width - WIDTH) > 4) {
      WIDTH = width;
      draw();
    }
  };

  /* ---- page ---- */

  const COLUMNS = {
    volumes: [
      ["Id", "id", "id"], ["Collection", "collection", "text"], ["Disk", "disk", "text"], ["Data Size", "size", "size"],
      ["Files", "files", "number"], ["Trash", "trash", "number"], ["Trash Size", "trash_size", "size"],
      ["Garbage", "garbage", "garbage"], ["TTL", "ttl", "text"], ["Replication", "replication", "text"],
      ["ReadOnly", "read_only", "flag"], ["Version", "version", "number"],
    ],
    remote: [
      ["Id", "id", "id"], ["Collection", "collection", "text"], ["Size", "size", "size"], ["Files", "files", "number"],
      ["Trash", "trash", "number"], ["Trash Size", "trash_size", "size"], ["Remote", "remote", "text"], ["Key", "key", "text"],
    ],
    ec: [
      ["Id", "id", "id"], ["Collection", "collection", "text"], ["Total Size", "size", "size"],
      ["Shards", "count", "number"], ["Shard Details", "shards", "text"], ["CreatedAt", "created", "text"],
    ],
  };

  const tables = {};
  const show = (document_) => {
    for (const [name, columns] of Object.entries(COLUMNS)) {
      const section = document.getElementById(name);
      if (!section) continue;
      if (tables[name]) tables[name].update(document_[name]);
      else tables[name] = new LiveTable(section, columns, document_[name]);
    }
    for (const [id, text] of Object.entries(document_.texts)) {
      const node = document.getElementById(id);
      if (node) node.textContent = text;
    }
    plots(document_.history);
  };

  let tableAge = 0;
  const refresh = async () => {
    if (document.hidden && tables.volumes) return;
    const whole = tableAge === 0; /* the tables every minute, the plots each time */
    tableAge = (tableAge + 1) % 12;
    try {
      const answer = await fetch(`?format=json${whole ? "" : "&part=history"}`, { headers: { Accept: "application/json" } });
      if (!answer.ok) throw new Error(String(answer.status));
      const document_ = await answer.json();
      if (whole) show(document_);
      else plots(document_.history);
      document.getElementById("state").textContent = "";
    } catch (error) {
      tableAge = 0;
      document.getElementById("state").textContent = "no answer from the server";
    }
  };
  window.addEventListener("resize", () => plots(drawnPoints));
  isNarrow.addEventListener("change", () => Object.values(tables).forEach((table) => table.draw()));
  refresh();
  setInterval(refresh, REFRESH_MS);
})();
