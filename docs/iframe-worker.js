// The search runs in a worker, and browsers start none for a page that was opened from a file. There a
// hidden frame does its work: the same script, with messages handed to and fro.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => setTimeout(() => deliver(this, data));
      const script = this.inside.document.createElement("script");
      this.loaded = new Promise((resolve, reject) => {
        script.onload = resolve;
        script.onerror = reject;
      });
      script.src = new URL(url, location);
      this.inside.document.body.append(script);
    }

    postMessage(data) {
      this.loaded.then(() => deliver(this.inside, data));
    }
  };
  const deliver = (target, data) => target.dispatchEvent(new MessageEvent("message", { data }));
}
