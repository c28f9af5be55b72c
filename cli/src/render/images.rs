//! Container images.

use hydrant_api::Image;

use super::{bytes, number, percent, table};
use crate::output::clean_line;

/// One line each.
pub fn images(images: &[Image]) -> String {
    if images.is_empty() {
        return "no images\n".into();
    }
    let row = |image: &Image| {
        let digest = image.digest.strip_prefix("sha256:").unwrap_or(&image.digest);
        let present = percent(image.present_bytes, image.segment_bytes);
        vec![
            image.reference.clone(),
            digest.get(..12).unwrap_or(digest).to_owned(),
            number(image.layers),
            bytes(image.bytes),
            format!("{} ({present})", bytes(image.present_bytes)),
            bytes(image.traced_bytes),
            image.mounts.join(" "),
        ]
    };
    let headings = ["IMAGE", "DIGEST", ">LAYERS", ">SIZE", ">PRESENT", ">TRACED", "MOUNTED AT"];
    let mut out = table(&headings, images.iter().map(row));
    for image in images {
        for refuted in &image.refuted {
            out.push_str(&clean_line(&format!("{}: {refuted}", image.reference)));
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list() {
        let image = Image {
            reference: "docker.io/library/busybox:latest".into(),
            digest: format!("sha256:{}", "0123456789ab".repeat(6)),
            manifest: String::new(),
            config: String::new(),
            layers: 1,
            files: 400,
            bytes: 1 << 20,
            present_bytes: 1 << 20,
            segment_bytes: 2 << 20,
            traced_bytes: 1 << 20,
            unproved: 1,
            refuted: vec!["the layer is another".into()],
            pulled_ms: 0,
            mounts: vec!["/mnt".into()],
        };
        let expected = r"
IMAGE                             DIGEST        LAYERS     SIZE         PRESENT   TRACED  MOUNTED AT
docker.io/library/busybox:latest  0123456789ab       1  1.0 MiB  1.0 MiB (50 %)  1.0 MiB  /mnt
docker.io/library/busybox:latest: the layer is another
";
        assert_eq!(images(&[image]), expected.trim_start());
        assert_eq!(images(&[]), "no images\n");
    }
}
