// Draws the report's charts from its data block and wires their buttons. Text is only ever set with textContent.
"use strict";
(() => {
  const read = (id) => {
    const block = document.getElementById(id);
    return block ? JSON.parse(block.textContent) : null;
  };
  const root = getComputedStyle(document.documentElement);
  const variable = (name) => root.getPropertyValue(name).trim();
  const color = (line) => variable("--arm-" + (line.color % 8));
  const dash = (line) => (line.color >= 8 ? [2, 4] : undefined);

  const PREFIXES = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const trim = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);
  const format = (value, digits = 4) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    for (const [factor, prefix] of PREFIXES) {
      if (size >= factor * 10 || (size >= factor && factor > 1e3)) return trim((value / factor).toPrecision(digits)) + " " + prefix;
    }
    const text = size !== 0 && size < 1e-4 ? value.toExponential(digits - 1) : trim(value.toPrecision(Math.max(digits, size >= 1000 ? 4 : 0)));
    return text.replace("-", "−");
  };

  // How many digits tell the labels of grid lines apart: down to the step between them.
  const digitsOf = (values) => {
    const known = values.filter((value) => value !== null);
    const steps = known.slice(1).map((value, i) => Math.abs(value - known[i])).filter((step) => step > 0);
    if (steps.length === 0) return 3;
    const size = (value) => Math.floor(Math.log10(value) + 1e-9);
    return Math.min(9, Math.max(3, size(Math.max(...known.map(Math.abs))) - size(Math.min(...steps)) + 1));
  };

  // The nearest index at which a series has a value, so that arms with other x values still give a reading.
  const nearest = (plot, series, index) => {
    const values = plot.data[series];
    if (values[index] != null) return index;
    for (let step = 1; step < values.length; step++) {
      if (values[index - step] != null) return index - step;
      if (values[index + step] != null) return index + step;
    }
    return index;
  };

  // A range with some room on both sides; a range without extent gets one.
  const spread = (low, high, log, room) => {
    if (low === null || high === null || low === undefined) return [log ? 1 : 0, log ? 10 : 1];
    if (low === high) return log ? [low / 2, high * 2] : [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
    if (log) return [low / Math.pow(high / low, room), high * Math.pow(high / low, room)];
    return [low - room * (high - low), high + room * (high - low)];
  };

  class Chart {
    constructor(figure, spec) {
      this.figure = figure;
      this.spec = spec;
      this.box = figure.querySelector(".plot");
      this.keys = [...figure.querySelectorAll(".key")];
      this.shown = spec.lines.map(() => true);
      this.axis = spec.axes[0].key;
      this.on = { log: spec.logY, half: false, seeds: false, whole: false };
      this.box.textContent = "";
      this.wire();
      this.draw();
      new ResizeObserver(() => this.fit()).observe(this.box);
    }

    wire() {
      this.keys.forEach((key, line) => {
        key.addEventListener("click", () => this.show(this.shown.map((was, other) => (other === line ? !was : was))));
        key.addEventListener("dblclick", () => {
          const alone = this.shown.every((was, other) => was === (other === line));
          this.show(this.shown.map((_, other) => alone || other === line));
        });
      });
      this.figure.querySelectorAll("button[data-axis]").forEach((button, _, all) => {
        button.addEventListener("click", () => {
          all.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
          this.axis = this.spec.axes[Number(button.dataset.axis)].key;
          this.draw();
        });
      });
      this.figure.querySelectorAll("[data-toggle]").forEach((button) => {
        button.addEventListener("click", () => {
          const name = button.dataset.toggle;
          this.on[name] = !this.on[name];
          button.setAttribute("aria-pressed", String(this.on[name]));
          this.draw();
        });
      });
    }

    show(shown) {
      this.shown = shown;
      this.keys.forEach((key, line) => key.setAttribute("aria-pressed", String(shown[line])));
      this.plot.batch(() => {
        this.owner.forEach((line, index) => {
          if (index > 0) this.plot.setSeries(index, { show: shown[line] });
        });
      });
      this.mark();
    }

    // One table per line, then series, bands and the line that each series belongs to.
    series() {
      const tables = [];
      const series = [{}];
      const bands = [];
      this.owner = [null];
      this.means = [];
      this.spec.lines.forEach((line, number) => {
        const add = (options) => {
          this.owner.push(number);
          return series.push({ spanGaps: false, show: this.shown[number], points: { show: false }, ...options }) - 1;
        };
        const columns = [line.x[this.axis], line.y];
        const few = line.y.filter((value) => value !== null).length <= 40;
        const stroke = () => color(line);
        this.means.push(add({ stroke, width: 2, dash: dash(line), points: { show: few, size: 6, fill: stroke } }));
        if (line.low) {
          columns.push(line.low, line.high);
          const low = add({ stroke: "transparent", width: 0 });
          const high = add({ stroke: "transparent", width: 0 });
          bands.push({ series: [high, low], fill: () => color(line) + "2b" });
        }
        if (this.on.seeds) {
          line.members.forEach((member) => {
            columns.push(member);
            add({ stroke: () => color(line) + "8c", width: 1 });
          });
        }
        tables.push(columns);
      });
      const data = uPlot.join(tables);
      const across = data[0];
      this.few = across.length <= 12;
      this.even = across.every((value, i) => Number.isInteger(value) && (i === 0 || value - across[i - 1] === across[1] - across[0]));
      return { data, series, bands };
    }

    options(series, bands) {
      const label = this.spec.axes.find((axis) => axis.key === this.axis).label;
      const line = { stroke: () => variable("--muted"), font: "12px " + variable("--sans"), labelFont: "12px " + variable("--sans"), labelSize: 22 };
      const lines = { grid: { stroke: () => variable("--rule"), width: 1 }, ticks: { stroke: () => variable("--rule"), width: 1, size: 5 } };
      const labelled = (plot, splits) => this.labelled(plot, splits);
      const text = (log) => (plot, values) => values.map((value) => (value === null ? null : format(value, log ? 3 : digitsOf(values))));
      return {
        ...this.size(),
        series,
        bands,
        legend: { show: false },
        padding: [10, 14, 0, 0],
        cursor: { y: false, points: { size: 9, show: (plot, index) => this.means.includes(index) && this.point(index) }, dataIdx: nearest, drag: { x: true, y: false } },
        scales: {
          x: { time: false, distr: this.spec.logX ? 3 : 1, range: (plot, low, high) => spread(low, high, this.spec.logX, 0) },
          y: { distr: this.on.log ? 3 : 1, range: (plot, low, high) => this.height(plot, low, high) },
        },
        axes: [
          { ...line, ...lines, label, values: text(this.spec.logX), space: 70, size: 30, ...this.across(labelled) },
          { ...line, ...lines, label: this.spec.y, values: text(this.on.log), ...(this.on.log && { filter: labelled }), size: (plot, values) => 18 + 7 * Math.max(2, ...(values || []).map((value) => (value || "").length)) },
        ],
        hooks: { setCursor: [(plot) => this.readings(plot)] },
      };
    }

    // With few points the grid lines of the horizontal axis stand at the points, if it is logarithmic (64, 128, 256 …) or the
    // points are whole numbers in even steps (layers); else a logarithmic one has them at 1, 2, 5 ….
    across(labelled) {
      const inSight = (plot) => plot.data[0].filter((value) => value >= plot.scales.x.min && value <= plot.scales.x.max);
      if (this.spec.logX) return this.few ? { splits: inSight, filter: (plot, splits) => splits } : { filter: labelled };
      return this.few && this.even ? { splits: inSight } : {};
    }

    // Which grid lines of a logarithmic axis get a label: powers of ten, and 2 and 5 times those where there is room.
    labelled(plot, splits) {
      const decades = Math.log10(splits[splits.length - 1] / splits[0]);
      const digits = decades < 3 && plot.width > 480 ? [1, 2, 5] : [1];
      return splits.map((value) => (digits.includes(Number(value.toExponential(6)[0])) && Number(value.toExponential(6).slice(2, 8)) === 0 ? value : null));
    }

    // The vertical range: what is in sight, or, for a whole run, all but its steep start.
    height(plot, low, high) {
      const [first, last] = plot.series[0].idxs;
      if (!this.spec.steep || this.on.whole || this.on.log || first > 0 || last < plot.data[0].length - 1) return spread(low, high, this.on.log, 0.06);
      let [least, most] = [Infinity, -Infinity];
      plot.series.forEach((series, index) => {
        if (index === 0 || !series.show) return;
        for (const value of plot.data[index].slice(Math.floor(last / 10))) {
          if (value == null) continue;
          least = Math.min(least, value);
          most = Math.max(most, value);
        }
      });
      return least > most ? spread(low, high, false, 0.06) : spread(least, most, false, 0.08);
    }

    point(index) {
      const dot = document.createElement("div");
      dot.className = "u-cursor-pt";
      const shade = color(this.spec.lines[this.owner[index]]);
      dot.style.width = dot.style.height = "9px";
      dot.style.marginLeft = dot.style.marginTop = "-4.5px";
      dot.style.background = shade;
      return dot;
    }

    draw() {
      if (this.plot) this.plot.destroy();
      const { data, series, bands } = this.series();
      this.plot = new uPlot(this.options(series, bands), data, this.box);
      this.at = document.createElement("span");
      this.at.className = "at";
      this.plot.over.append(this.at);
      if (this.on.half && data[0].length > 2) {
        const first = data[0][0];
        const last = data[0][data[0].length - 1];
        this.plot.setScale("x", { min: this.spec.logX ? Math.sqrt(first * last) : (first + last) / 2, max: last });
      }
      this.mark();
    }

    // What a test can see from outside.
    mark() {
      this.box.dataset.axis = this.axis;
      this.box.dataset.series = String(this.plot.series.length - 1);
      this.box.dataset.shown = String(this.plot.series.filter((series, index) => index > 0 && series.show).length);
    }

    readings(plot) {
      const { idx, idxs } = plot.cursor;
      this.at.textContent = idx == null ? "" : this.spec.axes.find((axis) => axis.key === this.axis).label + " " + format(plot.data[0][idx]);
      this.keys.forEach((key, line) => {
        const reading = key.querySelector(".reading");
        const index = idx == null ? null : idxs[this.means[line]];
        reading.textContent = index == null ? reading.dataset.rest : format(plot.data[this.means[line]][index]);
      });
    }

    size() {
      const width = Math.max(220, Math.floor(this.box.clientWidth));
      return { width, height: Math.round(Math.min(400, Math.max(250, width * 0.5))) };
    }

    fit() {
      const size = this.size();
      if (size.width !== this.plot.width) this.plot.setSize(size);
    }
  }

  const data = read("report-data");
  const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => new Chart(figure, data.charts[Number(figure.dataset.chart)]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.draw()));
  const redraw = () => charts.forEach((chart) => chart.fit());
  addEventListener("beforeprint", redraw);

  const numbers = document.getElementById("report-numbers");
  const button = document.getElementById("download");
  if (numbers && button) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([numbers.textContent], { type: "application/json" }));
      link.download = "result.json";
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }
})();
