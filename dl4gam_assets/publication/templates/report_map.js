/* The map of the report: outlines of every year over the chosen images. Data: the element map-data (web_map.py). */
(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const LOST = "#d55e00", NOW = "#0072b2", REST = "#8a8a8a";
  const byId = (id) => document.getElementById(id);
  const slider = byId("map-year"), label = byId("map-year-label"), go = byId("map-go"), told = byId("map-told");
  document.documentElement.classList.add("js");

  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const touch = L.Browser.mobile;
  const map = L.map("map", {
    preferCanvas: data.glaciers.length > 400, zoomSnap: 0.25, maxZoom: 18, attributionControl: false,
    zoomAnimation: !still, fadeAnimation: !still, markerZoomAnimation: !still,
    scrollWheelZoom: false, dragging: !touch,
  });
  L.control.scale({ imperial: false }).addTo(map);
  // A page that scrolls must not get stuck on a map: the wheel zooms once the map was clicked, a finger scrolls.
  map.on("focus", () => map.scrollWheelZoom.enable());
  map.on("blur", () => map.scrollWheelZoom.disable());
  map.createPane("pictures").style.zIndex = 300;

  const STEP = 1e-5;
  function shape(polygons) {
    return polygons.map((rings) => rings.map((steps) => {
      const points = [];
      let lon = 0, lat = 0;
      for (let k = 0; k < steps.length; k += 2) {
        lon += steps[k]; lat += steps[k + 1];
        points.push([lat * STEP, lon * STEP]);
      }
      return points;
    }));
  }
  function km2(value) { return value === null || value === undefined ? "\u2013" : value.toFixed(3); }
  function add(parent, tag, text, attributes) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const key in attributes || {}) made.setAttribute(key, attributes[key]);
    parent.appendChild(made);
    return made;
  }
  function title(g) { return g.n ? g.n + " (" + g.i + ")" : g.i; }

  function tooltip(g) {
    const box = document.createElement("div"), now = g.y[year];
    add(box, "strong", title(g));
    const first = g.y[data.baseline];
    if (first && first.k && year !== data.baseline) add(box, "div", data.baseline + ": " + km2(first.k[0]) + " km\u00b2");
    add(box, "div", now && now.k
      ? year + ": " + km2(now.k[0]) + " km\u00b2 (" + km2(now.k[1]) + " to " + km2(now.k[2]) + "), image of " + now.d
      : "no estimate for " + year + "; inventory: " + km2(g.a) + " km\u00b2");
    return box;
  }
  function popup(g) {
    const box = document.createElement("div");
    add(box, "strong", title(g));
    const table = add(box, "table"), head = add(add(table, "thead"), "tr"), body = add(table, "tbody");
    for (const text of ["Year", "km\u00b2", "interval", "image"]) add(head, "th", text, { scope: "col" });
    for (const y of data.years) {
      const e = g.y[y];
      if (!e || !e.k) continue;
      const row = add(body, "tr");
      add(row, "th", String(y), { scope: "row" });
      add(row, "td", km2(e.k[0]));
      add(row, "td", km2(e.k[1]) + " to " + km2(e.k[2]));
      add(row, "td", e.d);
    }
    if (!body.childNodes.length) { box.removeChild(table); add(box, "p", "No year has an estimate; inventory: " + km2(g.a) + " km\u00b2"); }
    else if (g.e) add(add(box, "p"), "a", "Where these numbers come from", { href: "#" + g.e });
    else { const p = add(box, "p", "Where they come from: "); add(p, "code", "dl4gam explain '" + g.i + "' --year " + year); }
    return box;
  }

  let year = data.year;
  const layers = [];  // all that depends on the year or on a switch
  const wanted = { pictures: true, baseline: true, interval: false };
  function bound(layer, g) {
    layer.bindTooltip(() => tooltip(g), { sticky: true }).bindPopup(() => popup(g), { maxWidth: 340 });
    layers.push(layer.addTo(map));
  }
  function draw() {
    for (const layer of layers.splice(0)) layer.remove();
    let estimates = 0;
    for (const g of data.glaciers) {
      const now = g.y[year], first = g.y[data.baseline];
      const pictured = wanted.pictures && now && now.p;
      if (now && now.k) estimates += 1;
      if (pictured) layers.push(L.imageOverlay(now.p, now.pb, { pane: "pictures", alt: "Image of " + title(g) + ", " + now.d }).addTo(map));
      if (g.s) bound(L.polygon(shape(g.s), { color: REST, weight: 1, fillOpacity: pictured ? 0 : 0.35 }), g);
      if (wanted.baseline && first && first.o && year !== data.baseline) {
        bound(L.polygon(shape(first.o), now && now.o
          ? { color: LOST, weight: 2, dashArray: "6 4", fillOpacity: pictured ? 0 : 0.85, fillColor: LOST }
          : { color: REST, weight: 1.5, dashArray: "6 4", fillOpacity: pictured ? 0 : 0.35 }), g);
      }
      if (now && now.o) bound(L.polygon(shape(now.o), { color: NOW, weight: 2, fillColor: NOW, fillOpacity: pictured ? 0.04 : 0.9 }), g);
      if (wanted.interval && now) for (const side of [now.lo, now.up]) {
        if (side) layers.push(L.polygon(shape(side), { color: "#000", weight: 1, dashArray: "1 3", fill: false, interactive: false }).addTo(map));
      }
    }
    label.textContent = year;
    slider.setAttribute("aria-valuetext", String(year));
    told.textContent = estimates + " of " + data.glaciers.length + " glaciers on the map have an estimate for " + year + ".";
  }

  slider.max = data.years.length - 1;
  slider.value = data.years.indexOf(year);
  slider.addEventListener("input", () => { year = data.years[Number(slider.value)]; map.closePopup(); draw(); });
  for (const name in wanted) {
    const box = byId("map-" + name);
    if (!box) continue;
    box.checked = wanted[name];
    box.addEventListener("change", () => { wanted[name] = box.checked; draw(); });
  }
  const all = L.latLngBounds(data.glaciers.map((g) => g.b).flat());
  const closely = data.closely.map((id) => data.glaciers.find((g) => g.i === id));
  closely.forEach((g, k) => add(go, "option", title(g), { value: k }));
  go.addEventListener("change", () => {
    map.closePopup();
    if (go.value === "") { map.fitBounds(all); return; }
    map.fitBounds(L.latLngBounds(closely[Number(go.value)].b).pad(0.15));
  });
  map.fitBounds(all);
  draw();

  // A link to an explanation opens the fold that it stands in.
  function open() {
    const target = location.hash.length > 1 && byId(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    const fold = target.closest("details");
    if (fold) fold.open = true;
    (fold || target).scrollIntoView();
  }
  addEventListener("hashchange", open);
  open();
})();
